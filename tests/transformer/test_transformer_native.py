"""The compiled backend: every instruction set, sanitizers, and that unwritten outputs would show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import require
from native_levels import LEVELS, check_level, check_sanitized
from transformer_cases import make_case, run

SCRIPT = Path(__file__).parent / "transformer_equality.py"


@pytest.fixture(autouse=True)
def native():
    return require("transformer_step", "native")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    check_level(SCRIPT, level, cases=20)


def test_sanitizers():
    check_sanitized(SCRIPT, cases=10)


def test_outputs_start_as_nan():
    """The output is allocated by `aten::new_empty`, which the fixture `nan_filled_empty` makes fill it."""
    with torch.profiler.profile() as profile:
        run(make_case(0), "native")
    inside = [event.name for event in profile.events()]
    inside = inside[inside.index("aar_native::transformer_step") :]
    assert "aten::new_empty" in inside
    assert "aten::fill_" in inside
