"""The compiled backend at every instruction set, and under the sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import require
from native_levels import LEVELS, check_level, check_sanitized

SCRIPT = Path(__file__).parent / "sampling_equality.py"


@pytest.fixture(autouse=True)
def native():
    return require("sampling_sample", "native")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    check_level(SCRIPT, level, cases=20)


def test_sanitizers():
    check_sanitized(SCRIPT, cases=8)
