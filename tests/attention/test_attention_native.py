"""The compiled backend: every instruction set, sanitizers, threads, and that unwritten outputs would show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_cases import attention_case, by_steps, forward_and_gradients
from helpers import require
from native_levels import LEVELS, check_level, check_sanitized

from aar_kernels import ScaleSchedule
from aar_kernels.attention import scale_attention

SCRIPT = Path(__file__).parent / "attention_equality.py"


@pytest.fixture(autouse=True)
def native():
    return require("attention_forward", "native")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    check_level(SCRIPT, level, cases=8)


def test_sanitizers():
    check_sanitized(SCRIPT, cases=3)


def test_results_do_not_depend_on_the_number_of_threads():
    """One head for several threads too, which then share its rows."""
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            result = []
            for batch, heads in ((1, 1), (3, 2)):
                case = attention_case("published", batch=batch, heads=heads)
                result += [*forward_and_gradients(case, "native").values(), by_steps(case, "native")[0]]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(ours, single) for ours, single in zip(other, results[0], strict=True))


def test_outputs_start_as_nan():
    """The kernels' outputs are allocated by `aten::new_empty`, which the fixture `fill_empty` makes fill them."""
    case = attention_case(0)
    with torch.profiler.profile() as profile:
        forward_and_gradients(case, "native")
    names = [event.name for event in profile.events()]
    for operator, outputs in (("attention_forward", 2), ("attention_backward", 4)):
        inside = names[names.index(f"aar_native::{operator}") :]
        assert inside[: 4 * outputs + 4].count("aten::new_empty") >= outputs
        assert "aten::fill_" in inside


def test_storage_formats_round_as_pytorch_does():
    """A token that sees itself alone is copied through fp32: every bf16 and fp16 number survives."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        v = bits.view(dtype).reshape(-1, 1, 1, 64)
        q = torch.zeros_like(v)
        out = scale_attention(q, q, v, ScaleSchedule([1]), backend="native")
        assert torch.equal(out.isnan(), v.isnan())
        assert torch.equal(out[~v.isnan()], v[~v.isnan()])
    # Means of neighbours lie halfway between two numbers.
    for dtype in (torch.bfloat16, torch.float16):
        finite = bits.view(dtype)[bits.view(dtype).float().abs() < 1e38][:60000].reshape(-1, 60)
        v = torch.stack([finite, finite.roll(1, dims=1)], dim=1)[:, :, None]
        q = torch.zeros_like(v)
        out = scale_attention(q, q, v, ScaleSchedule([2]), backend="native")
        assert torch.equal(out[:, 0], (v.float().sum(1) / 2).to(dtype))
