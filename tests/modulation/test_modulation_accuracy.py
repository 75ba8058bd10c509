"""Results and gradients of every backend against the float64 reference, and against formulas written down here."""

from __future__ import annotations

import pytest
import torch
from modulation_cases import CHANNELS, DTYPES, Case, assert_accurate, forward, make_case, random_case, training_step

from aar_kernels import modulation


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_dtypes(fast, dtype, channels, gated):
    """33 rows: one whole block of the backward pass's sums, and one row of the next."""
    assert_accurate(make_case(0, length=33, channels=channels, dtype=dtype, gated=gated), fast)


@pytest.mark.parametrize("seed", range(40))
def test_random(fast, seed):
    assert_accurate(random_case(seed), fast)


def test_published_size(fast):
    assert_accurate(make_case(0, length=455, channels=1024), fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_accuracy(fast, dtype):
    """The variance is that of differences from the mean: E[x^2] - E[x]^2 would have no digit left."""
    assert_accurate(make_case(0, channels=100, gated=False, offset=3000.0, dtype=dtype), fast)


def test_reference_is_the_formula():
    """The definition, spelled out with the mean and the variance."""
    case = make_case(3, channels=7).double()
    _, shift, scale, gate, *_ = (part[:, None] for part in case.projection.chunk(6, dim=-1))
    x_new = case.x + gate * case.y
    centred = x_new - x_new.mean(dim=-1, keepdim=True)
    normal = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    for ours, expected in zip(
        forward(case, case.x, case.y, case.projection, "reference"), (x_new, normal * (1 + scale) + shift), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps(backend, eps):
    """A constant row is nothing but its shift; and eps counts where the variance is small."""
    shift = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    scale = torch.ones(1, 4)
    constant = modulation.layer_norm_modulate(torch.full((1, 2, 4), 3.0), scale, shift, eps=eps, backend=backend)
    assert torch.equal(constant, shift[:, None].expand(1, 2, 4))
    x = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])
    normal = modulation.layer_norm_modulate(x, 0 * scale, 0 * shift, eps=eps, backend=backend)
    torch.testing.assert_close(normal, x / (1 + eps) ** 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_stays_alone(backend, value):
    case = make_case(0, length=4, channels=100)
    sound = forward(case, case.x, case.y, case.projection, backend)
    case.x[1, 2, 3] = value
    broken = forward(case, case.x, case.y, case.projection, backend)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    assert not broken[0][1, 2, 3].isfinite()
    assert broken[1][1, 2].isnan().all()
    for before, after in zip(sound, broken, strict=True):
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_nothing_to_do(backend, batch, length, gated):
    """Empty results, and gradients of zero for what has no rows."""
    case = make_case(0, batch=batch, length=length, gated=gated)
    results = training_step(case, backend)
    assert results["modulated"].shape == case.x.shape
    assert results["gradient of x"].shape == case.x.shape
    assert results["gradient of projection"].shape == case.projection.shape
    assert results["gradient of projection"].count_nonzero() == 0


def test_views(backend):
    """Non-contiguous inputs give what their copies give."""
    case = make_case(0, batch=3, length=6, channels=64)
    wide = torch.cat([case.x, case.y], dim=-1)
    strided = case.projection.repeat_interleave(2, dim=-1)[:, ::2]
    transposed = case.y.transpose(0, 1).contiguous().transpose(0, 1)
    views = Case(wide[..., :64], transposed, strided)
    assert not any(tensor.is_contiguous() for tensor in (views.x, views.y, views.projection))
    expected = training_step(case, backend)
    outputs = forward(views, views.x, views.y, views.projection, backend)
    for ours, name in zip(outputs, ("x_new", "modulated"), strict=True):
        assert torch.equal(ours, expected[name])
    x, y, projection = (tensor.detach().requires_grad_() for tensor in (views.x, views.y, views.projection))
    x_new, modulated = forward(views, x, y, projection, backend)
    # The gradient of a sum is an expanded one.
    ours = torch.autograd.grad(modulated.sum() + x_new.sum(), [x, y, projection])
    x, y, projection = (tensor.clone().requires_grad_() for tensor in (case.x, case.y, case.projection))
    outputs = forward(case, x, y, projection, backend)
    plain = torch.autograd.grad(outputs, [x, y, projection], [torch.ones_like(out) for out in outputs])
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


def test_one_row_for_all_items(backend):
    """An expanded condition, whose rows all lie in the same place."""
    case = make_case(0, batch=3)
    one = case.projection[:1].expand(3, -1)
    ours = forward(case, case.x, case.y, one, backend)
    for a, b in zip(ours, forward(case, case.x, case.y, one.contiguous(), backend), strict=True):
        assert torch.equal(a, b)
