"""Fixtures for the operators' tests, and what the session says about codes at its end."""

from __future__ import annotations

import pytest
from helpers import FAST, MARGINS, require


@pytest.fixture(params=[*FAST, "reference"])
def backend(request) -> str:
    return require("msrq_encode", request.param)


@pytest.fixture(params=FAST)
def fast(request) -> str:
    """A backend that is held to the reference."""
    return require("msrq_encode", request.param)


def pytest_terminal_summary(terminalreporter) -> None:
    if MARGINS:
        codes, differ, widest = zip(*MARGINS, strict=True)
        terminalreporter.write_line(
            f"codes against float64: {sum(codes)} compared, {sum(differ)} differ, all within the rounding bound "
            f"(the widest uses {max(widest):.2g} of it)"
        )
