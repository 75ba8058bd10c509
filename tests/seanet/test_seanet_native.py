"""The compiled backend: every instruction set, sanitizers, and that unwritten outputs would show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import require
from native_levels import LEVELS, check_level, check_sanitized
from seanet_cases import make_layers, make_lstm

from aar_kernels.bench.measure import peak_memory
from aar_kernels.seanet import lstm, pack, pack_lstm, stack

SCRIPT = Path(__file__).parent / "seanet_equality.py"


@pytest.fixture(autouse=True)
def native():
    return require("seanet_stack", "native")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    check_level(SCRIPT, level, cases=60)


def test_sanitizers():
    check_sanitized(SCRIPT, cases=40)


@pytest.mark.parametrize("name", ["seanet_stack", "seanet_lstm"])
def test_outputs_start_as_nan(name):
    """The output is allocated by `aten::new_empty`, which the fixture `nan_filled_empty` makes fill it."""
    packed, packed_lstm = pack(make_layers(0)), pack_lstm(make_lstm(0, 4, 1)[0])
    with torch.profiler.profile() as profile:
        if name == "seanet_stack":
            stack(torch.randn(1, packed.fields[0].inputs, 20), packed, backend="native")
        else:
            lstm(torch.randn(1, 4, 20), packed_lstm, backend="native")
    inside = [event.name for event in profile.events()]
    inside = inside[inside.index(f"aar_native::{name}") :]
    assert "aten::new_empty" in inside
    assert "aten::fill_" in inside


def test_memory_does_not_grow_with_the_signal():
    """Ten times the signal takes no more than its own output more."""
    torch.manual_seed(0)
    packed = pack(make_layers(3))
    steps = 20_000
    signals = [torch.randn(1, packed.fields[0].inputs, length) for length in (steps, 20 * steps)]
    extra = []
    for x in signals:
        out = stack(x, packed, backend="native")
        used = peak_memory(lambda x=x: stack(x, packed, backend="native"))
        if used is None:
            pytest.skip("this system does not tell how much memory a process uses")
        extra.append(used - (out.nbytes + x.nbytes) / 2**20)
    assert extra[1] < extra[0] + 4
