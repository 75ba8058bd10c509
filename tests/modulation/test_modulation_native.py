"""The compiled backend: every instruction set, sanitizers, and that unwritten outputs would show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import require
from modulation_cases import forward, make_case
from native_levels import LEVELS, check_level, check_sanitized

SCRIPT = Path(__file__).parent / "modulation_equality.py"


@pytest.fixture(autouse=True)
def native():
    return require("modulation_forward", "native")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    check_level(SCRIPT, level, cases=14)


def test_sanitizers():
    check_sanitized(SCRIPT, cases=6)


def test_outputs_start_as_nan():
    """The kernels' outputs are allocated by `aten::new_empty`, which the fixture `nan_filled_empty` makes fill them."""
    case = make_case(0)
    with torch.profiler.profile() as profile:
        forward(case, case.x, case.y, case.projection, "native")
    inside = [event.name for event in profile.events()]
    inside = inside[inside.index("aar_native::modulation_forward") :]
    assert "aten::new_empty" in inside
    assert "aten::fill_" in inside
