"""Fixtures for the operators' tests, and what the session says about codes at its end."""

from __future__ import annotations

import pytest
import torch
from helpers import MARGINS


@pytest.fixture
def nan_filled_empty():
    """Uninitialised memory is NaN (the largest number where integer), so that an output nobody wrote shows.

    PyTorch does that in `aten::empty`, which every allocation of the native operators also goes through; it
    comes with deterministic algorithms, so that those are on in every test that takes this.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["margins"] = MARGINS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Of pytest-xdist: what a process of its own found is told by the one that prints."""
    MARGINS.extend(getattr(node, "workeroutput", {}).get("margins", []))


def pytest_terminal_summary(terminalreporter) -> None:
    if MARGINS:
        codes, differ, widest = zip(*MARGINS, strict=True)
        terminalreporter.write_line(
            f"codes against float64: {sum(codes)} compared, {sum(differ)} differ, all within the rounding bound "
            f"(the widest uses {max(widest):.2g} of it)"
        )
