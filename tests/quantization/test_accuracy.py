"""Every backend against the reference in float64, over random quantizers, schedules, lengths and masks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import Case, as_dtype, assert_codes, assert_steps, make_case, near_ties, replay
from helpers import assert_as_accurate
from torch import Tensor

from aar_kernels import ScaleSchedule, quantization
from aar_kernels.quantization import Levels, reference

SEEDS = ["published", *range(42)]


def random_codes(case: Case) -> Tensor:
    """Any codes, some of them "no code"."""
    levels = case.levels
    generator = torch.Generator().manual_seed(0)
    shape = len(case.x), levels.schedule.total
    codes = torch.randint(levels.codebook_size, shape, generator=generator)
    return codes.masked_fill(torch.rand(shape, generator=generator) < 0.1, -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_encode(backend, seed):
    case = make_case(seed)
    assert_codes(quantization.encode(case.x, case.levels, mask=case.mask, backend=backend), case)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_encode_between_two_codes(backend, metric):
    case = near_ties(metric)
    assert_codes(quantization.encode(case.x, case.levels, backend=backend), case)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("size", [7, 32, 1000])
def test_the_first_of_equal_codes_wins(backend, size, metric):
    """Every code is there three times: once in the first third, then in an order of its own in each other
    third."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(size, 24, generator=generator)
    orders = [torch.arange(size), torch.randperm(size, generator=generator), torch.arange(size).flip(0)]
    levels = Levels(
        ScaleSchedule([64]), torch.cat([distinct[order] for order in orders])[None], metric=metric
    )
    codes = quantization.encode(torch.randn(3, 24, 64, generator=generator), levels, backend=backend)
    assert (codes < size).all()


@pytest.mark.parametrize("name", ["decode", "decode_scales", "next_scale_inputs"])
@pytest.mark.parametrize("seed", SEEDS)
def test_decode(fast, seed, name):
    case = make_case(seed)
    codes, double = random_codes(case), as_dtype(case.levels, torch.float64)
    function = getattr(quantization, name)
    ours = function(codes, case.levels, length=case.length, backend=fast)
    plain = function(codes, case.levels, length=case.length, backend="reference")
    exact = function(codes, double, length=case.length, backend="reference")
    assert_as_accurate(ours, plain, exact)


@pytest.mark.parametrize("seed", SEEDS)
def test_step(fast, seed):
    case = make_case(seed)
    assert_steps(random_codes(case), case, fast)


def train(run, x: Tensor, levels, cotangent: Tensor) -> dict[str, Tensor]:
    """Everything that a training step computes; ``run(x, levels)`` is the forward pass."""
    x = x.detach().clone().requires_grad_()
    weights = [*levels.phi_weights, *levels.phi_biases]
    for weight in weights:
        weight.requires_grad_()
    quantized, codes, loss, statistics = run(x, levels)
    objective = (quantized * cotangent.to(quantized.dtype)).sum() + 3 * loss
    # A short schedule leaves kernels unused, and the reference then gives None.
    x_grad, *phi_grads = torch.autograd.grad(
        objective, [x, *weights], allow_unused=True, materialize_grads=True
    )
    phi_grad = torch.cat([x_grad.new_empty(0), *(grad.flatten() for grad in phi_grads)])
    return {
        "quantized": quantized, "codes": codes, "loss": loss, "statistics": statistics,
        "x.grad": x_grad, "phi.grad": phi_grad,
    }  # fmt: skip


@pytest.mark.parametrize("straight_through", ["per_scale", "once"])
@pytest.mark.parametrize("seed", SEEDS)
def test_quantize(backend, seed, straight_through):
    """The forward pass, the statistics with samples, and the gradients, along the backend's own codes."""
    case, per_scale = make_case(seed), straight_through == "per_scale"
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(case.levels.schedule.lengths[: len(case.levels.codebooks)]) * len(case.x)
    samples = (torch.rand(case.levels.codebooks.shape[:2], generator=generator) * rows[:, None]).long()
    cotangent = torch.randn(case.x.shape, generator=generator)

    def run(x, levels):
        return quantization.quantize(
            x, levels, mask=case.mask, straight_through=straight_through, statistics=True, samples=samples,
            backend=backend,
        )  # fmt: skip

    ours = train(run, case.x, as_dtype(case.levels, torch.float32), cotangent)
    assert_codes(ours["codes"], case)

    def expected(dtype):
        def run(x, levels):
            arguments = x.mT, case.mask, *levels.arguments(), samples, per_scale, True
            (quantized, *rest), _ = replay(ours["codes"], levels, reference.quantize, *arguments)
            return quantized.mT, *rest

        return train(run, case.x.to(dtype), as_dtype(case.levels, dtype), cotangent)

    plain, exact = expected(torch.float32), expected(torch.float64)
    hits = case.levels.codebooks.shape[0] * case.levels.codebook_size
    assert torch.equal(ours["statistics"][:hits].double(), exact["statistics"][:hits])
    for what in ours.keys() - {"codes"}:
        assert_as_accurate(ours[what], plain[what], exact[what], what)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_searched_in_float32(backend, dtype, seed):
    case = make_case(seed)
    x = case.x.to(dtype)
    codes = quantization.encode(x, case.levels, mask=case.mask, backend=backend)
    assert torch.equal(codes, quantization.encode(x.float(), case.levels, mask=case.mask, backend=backend))
    quantized, trained, loss, _ = quantization.quantize(x, case.levels, mask=case.mask, backend=backend)
    single, _, _, _ = quantization.quantize(x.float(), case.levels, mask=case.mask, backend=backend)
    assert torch.equal(trained, codes)
    assert loss.dtype == torch.float32
    assert torch.equal(quantized, single.to(dtype))


@pytest.mark.parametrize("seed", [0, 3])
def test_any_memory_layout(backend, seed):
    """Transposed, sliced and expanded tensors give what contiguous copies of them give."""
    case = make_case(seed, masked="holes", batch=4)
    codes = quantization.encode(case.x.contiguous(), case.levels, mask=case.mask, backend=backend)
    wide = torch.full((4, case.levels.latent_dim, 2 * case.length), torch.nan)
    wide[..., ::2] = case.x
    mask = case.mask.T.contiguous().T
    levels = as_dtype(case.levels, torch.float32)
    books = levels.codebooks.mT.contiguous().mT
    spread = [weight.permute(2, 1, 0).contiguous().permute(2, 1, 0) for weight in levels.phi_weights]
    strided = dataclasses.replace(levels, codebooks=books, phi_weights=spread)
    assert torch.equal(quantization.encode(wide[..., ::2], strided, mask=mask, backend=backend), codes)
    doubled = torch.stack([codes, codes], dim=-1)[..., 0]
    assert not doubled.is_contiguous()
    for name in ("decode", "decode_scales", "next_scale_inputs"):
        function = getattr(quantization, name)
        assert torch.equal(
            function(doubled, strided, backend=backend), function(codes, case.levels, backend=backend)
        )
    ours = quantization.quantize(wide[..., ::2], strided, mask=mask, statistics=True, backend=backend)
    same = quantization.quantize(case.x, case.levels, mask=case.mask, statistics=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


def test_float64_runs_on_the_reference(backend):
    """float64 stays float64: no fast backend takes it, and the automatic choice does not narrow it."""
    case = make_case(0)
    double = as_dtype(case.levels, torch.float64)
    decoded = quantization.decode(random_codes(case), double)
    assert decoded.dtype == torch.float64
    assert torch.equal(decoded, quantization.decode(random_codes(case), double, backend="reference"))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 1), (4, 33, 16), (1, 100, 7)])
def test_update(backend, shape, replace):
    """The codebooks' moving averages, with samples for dead codes among the statistics or without."""
    generator = torch.Generator().manual_seed(sum(shape))
    books, size, dim = shape
    hits = torch.randint(0, 5, (books, size), generator=generator).float()
    drawn = [torch.randn(books, size, dim, generator=generator) for _ in range(4 if replace else 3)]
    drawn[-1][:, ::3] = 0  # samples that offer nothing, where there are samples
    codebooks, average, sums, *sampled = drawn
    cluster_size = 4 * torch.rand(books, size, generator=generator)
    statistics = torch.cat([part.flatten() for part in (hits, sums, *sampled)])

    def run(dtype, name):
        state = [part.to(dtype, copy=True) for part in (codebooks, cluster_size, average)]
        options = {"decay": 0.9, "epsilon": 1e-3, "dead_code_threshold": 2.0}
        quantization.update(*state, statistics.to(dtype), **options, backend=name)
        return state

    fast, plain, double = run(torch.float32, backend), run(torch.float32, "reference"), run(torch.float64, "reference")
    for name, a, b, truth in zip(("codebooks", "cluster_size", "embed_avg"), fast, plain, double, strict=True):
        assert_as_accurate(a, b, truth, name)
    if replace and size > 1:
        taken = (double[1] == 2.0).flatten()
        assert taken.any()
        assert not taken.all()
