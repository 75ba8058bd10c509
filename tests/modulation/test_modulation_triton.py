"""The Triton backend in Triton's interpreter, against the float64 reference. Small cases: the interpreter is slow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import interpreter
from modulation_cases import DTYPES, assert_accurate, forward, make_case, training_step


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("channels", [1, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_dtypes(dtype, channels, gated):
    """Nine rows: one whole block of the backward pass's sums, and one row of the next."""
    assert_accurate(make_case(0, length=9, channels=channels, dtype=dtype, gated=gated), "triton")


@pytest.mark.parametrize("projection_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_mixed_dtypes(autocast, projection_dtype):
    case = make_case(
        1, channels=48, y_dtype=torch.bfloat16, projection_dtype=projection_dtype, autocast=autocast, expanded=True
    )
    assert_accurate(case, "triton")


def test_many_channels():
    """More than one block of the reduction, and more than one warp."""
    assert_accurate(make_case(2, length=3, channels=1100), "triton")


def test_a_large_mean_costs_no_accuracy():
    assert_accurate(make_case(0, channels=100, gated=False, offset=3000.0), "triton")


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_nothing_to_do(batch, length):
    results = training_step(make_case(0, batch=batch, length=length), "triton")
    assert results["modulated"].shape == (batch, length, 64)
    assert results["gradient of projection"].count_nonzero() == 0


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_without_a_gradient(used):
    gradients = []
    for backend in ("triton", "reference"):
        case = make_case(0)
        inputs = [tensor.requires_grad_() for tensor in (case.x, case.y, case.projection)]
        gradients.append(torch.autograd.grad(forward(case, *inputs, backend)[used].square().sum(), inputs))
    for fast, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_views():
    case = make_case(0)
    strided = replace(
        case, y=case.y.transpose(0, 1).contiguous().transpose(0, 1),
        projection=case.projection.repeat_interleave(2, dim=-1)[:, ::2],
    )  # fmt: skip
    ours = forward(strided, strided.x, strided.y, strided.projection, "triton")
    for a, b in zip(ours, forward(case, case.x, case.y, case.projection, "triton"), strict=True):
        assert torch.equal(a, b)


def test_opcheck():
    case = make_case(0, channels=8)
    gate, scale, shift, *_ = (part.clone().requires_grad_() for part in case.projection.chunk(6, dim=-1))
    arguments = (case.x.requires_grad_(), case.y.requires_grad_(), gate, scale, shift, 1e-6, torch.bfloat16, "triton")
    torch.library.opcheck(torch.ops.aar_kernels.modulation_forward.default, arguments)


interpreter.isolate(globals())
