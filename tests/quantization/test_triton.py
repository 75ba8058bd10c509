"""The Triton backend in Triton's interpreter, against the float64 reference. Small cases: the interpreter is
slow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import interpreter
from cases import Case, as_dtype, assert_codes, replay
from helpers import assert_as_accurate

from aar_kernels import ScaleSchedule
from aar_kernels.quantization import Levels, api, phi_sharing_index

DECODERS = ("decode", "decode_scales", "next_scale_inputs")


def make(
    lengths, length: int, *, batch: int = 2, dim: int = 8, size: int = 20, widths: tuple[int, ...] = (),
    metric: str = "euclidean", shared: bool = False, masked: bool = False,
) -> Case:  # fmt: skip
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    books = draw(1 if shared else len(lengths), size, dim) / 2
    weights = [draw(dim, dim, k) / (dim * k) ** 0.5 for k in widths]
    index = phi_sharing_index(len(widths), len(lengths)) if widths else ()
    levels = Levels(ScaleSchedule(lengths), books, weights, [draw(dim) / 10 for _ in widths], index, metric)
    frames = torch.linspace(length - 1, 0, batch).long()[:, None]  # the last item has none
    return Case(levels, draw(batch, dim, length), torch.arange(length) < frames if masked else None)


def random_lengths(seed: int) -> list[int]:
    return torch.randint(1, 12, (3,), generator=torch.Generator().manual_seed(seed)).tolist()


CASES = {
    "partial phi": make((1, 3, 5, 13), 13, widths=(5, 3)),
    "unshared phi, masked": make((2, 5, 9), 13, widths=(1, 7, 3), masked=True, batch=3),
    "full phi, longer, several blocks": make((1, 4), 18, dim=40, size=150, widths=(9,)),
    "shorter, more tokens than a block": make((3, 19), 5, widths=(3,), metric="cosine"),
    "no phi": make((5, 5, 5), 5, metric="cosine", shared=True),
    "one frame": make((1, 2), 1, widths=(5,), shared=True, batch=1),
    "one second": make((1, 31, 75), 75, dim=3, batch=1),
    "random": make(random_lengths(0), 6, widths=(3,)),
    "random, masked": make(random_lengths(1), 11, widths=(3,), masked=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def random_codes(case: Case) -> Tensor:
    shape = len(case.x), case.levels.schedule.total
    return torch.randint(-1, case.levels.codebook_size, shape, generator=torch.Generator().manual_seed(1))


@every_case
def test_encode(case: Case):
    assert_codes(api.encode(case.x, case.levels, mask=case.mask, backend="triton"), case)


@every_case
@pytest.mark.parametrize("name", DECODERS)
def test_decode(name: str, case: Case):
    run = lambda levels, backend: getattr(api, name)(  # noqa: E731
        random_codes(case), levels, length=case.length, backend=backend
    )
    double = as_dtype(case.levels, torch.float64)
    assert_as_accurate(run(case.levels, "triton"), run(case.levels, "reference"), run(double, "reference"))


@every_case
def test_steps_are_the_next_scale_inputs(case: Case):
    """Over next scales of one token and of more than there are frames, whose windows are shared by programs."""
    f_hat, inputs = torch.zeros(len(case.x), case.length, case.levels.latent_dim), []
    for s, part in enumerate(random_codes(case).split(list(case.levels.schedule.lengths), dim=1)):
        f_hat, pooled = api.step(s, f_hat, part, case.levels, backend="triton")
        inputs.append(pooled)
    assert pooled.shape == (len(case.x), 0, case.levels.latent_dim)
    for fast, name in ((torch.cat(inputs, dim=1), "next_scale_inputs"), (f_hat.mT, "decode")):
        levels = case.levels, as_dtype(case.levels, torch.float64)
        run = lambda m, name=name: getattr(api, name)(  # noqa: E731
            random_codes(case), m, length=case.length, backend="reference"
        )
        assert_as_accurate(fast, *map(run, levels), name)


def training_step(case: Case, levels: Levels, straight_through: str, backend: str) -> dict[str, Tensor]:
    """Every result of quantize, and the gradients of something that depends on all of them."""
    x = case.x.to(levels.codebooks.dtype).requires_grad_()
    weights = [weight.requires_grad_() for weight in levels.weights[1:]]
    rows = len(x) * torch.tensor(levels.schedule.lengths[: len(levels.codebooks)])[:, None]
    samples = torch.arange(levels.codebooks[..., 0].numel()).view(levels.codebooks.shape[:2]) % rows
    quantized, codes, loss, statistics = api.quantize(
        x, levels, mask=case.mask, straight_through=straight_through, statistics=True, samples=samples,
        backend=backend,
    )  # fmt: skip
    target = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    gradients = torch.autograd.grad((quantized * target).sum() + 3 * loss, [x, *weights])
    hits, sums, sampled = statistics.split(
        [levels.codebooks[..., 0].numel()] + 2 * [levels.codebooks.numel()]
    )
    named = {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return {
        "codes": codes,
        "quantized": quantized,
        "loss": loss,
        "hits": hits,
        "sums": sums,
        "sampled": sampled,
    } | named


@every_case
def test_quantize(case: Case):
    mode = "once" if len(case.levels.codebooks) == 1 else "per_scale"
    fast = training_step(case, as_dtype(case.levels, torch.float32), mode, "triton")
    assert_codes(fast["codes"], case)
    plain, exact = (
        replay(fast["codes"], levels, training_step, case, levels, mode, "reference")[0]
        for levels in (as_dtype(case.levels, torch.float32), as_dtype(case.levels, torch.float64))
    )
    for name in exact.keys() - {"codes"}:
        assert_as_accurate(fast[name], plain[name], exact[name], name)


def test_the_first_of_equal_codes_wins():
    """Within one block of the search and across two. Whole numbers, so that equal codes are equally far."""
    case = make((3,), 3, size=140)
    for period in (7, 70):
        levels = replace(
            case.levels, codebooks=(4 * case.levels.codebooks).round()[:, torch.arange(140) % period]
        )
        codes = api.encode(case.x.round(), levels, backend="triton")
        assert codes.max() < period
        assert torch.equal(codes, api.encode(case.x.round(), levels, backend="reference"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["once", "per_scale"])
def test_a_broken_item_has_no_codes(value: float, mode: str):
    case = make((1, 4), 5, widths=(3,), batch=3)
    x = case.x.clone()
    x[1, 2, 3] = value
    fast, plain = (
        api.quantize(x, case.levels, straight_through=mode, statistics=True, backend=backend)
        for backend in ("triton", "reference")
    )
    assert (fast[1][1] == -1).all()
    assert torch.equal(fast[1], plain[1])
    assert torch.equal(fast[0].isnan(), plain[0].isnan())
    assert not fast[2].isfinite()
    assert fast[3].isfinite().all()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3] = False
    assert (api.encode(x, case.levels, mask=mask, backend="triton") >= 0).all()


@pytest.mark.parametrize("code", [-2, 20])
def test_codes_out_of_range(code: int):
    case = CASES["no phi"]
    codes = random_codes(case)
    codes[1, 3] = code
    with pytest.raises(RuntimeError, match="codes must be in"):
        api.decode(codes, case.levels, backend="triton")
    with pytest.raises(RuntimeError, match="codes must be in"):
        api.step(0, torch.zeros(2, 5, 8), codes[:, :5], case.levels, backend="triton")


def test_empty_batch():
    case = make((1, 3), 4, widths=(3,), batch=0)
    assert api.encode(case.x, case.levels, backend="triton").shape == (0, 4)
    assert api.next_scale_inputs(random_codes(case), case.levels, backend="triton").shape == (0, 3, 8)
    samples = torch.zeros(2, 20, dtype=torch.int64)
    loss, statistics = api.quantize(case.x, case.levels, statistics=True, samples=samples, backend="triton")[
        2:
    ]
    assert loss == 0
    assert len(statistics) == 2 * 20 * 17
    assert statistics.count_nonzero() == 0


def test_half_precision_is_searched_in_fp32():
    case = CASES["no phi"]
    codes = api.encode(case.x.half(), case.levels, backend="triton")
    assert_codes(codes, replace(case, x=case.x.half().float()))


def test_large_tables_and_long_sequences(monkeypatch):
    """Tables that are built scale by scale, and 64-bit indices, change nothing but the order of the loss's
    sum."""
    from aar_kernels.quantization import triton

    case = CASES["partial phi"]
    run = lambda: [  # noqa: E731
        api.decode(random_codes(case), case.levels, backend="triton"),
        api.decode_scales(random_codes(case), case.levels, backend="triton"),
        *api.quantize(case.x, case.levels, backend="triton"),
    ]
    usual = run()
    monkeypatch.setattr(triton, "TABLE_LIMIT", 0)
    monkeypatch.setattr(triton, "INT32_MAX", 0)
    for ours, theirs in zip(run(), usual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if ours.dim() == 0 else 0, atol=0)


def test_tables_follow_the_weights():
    case = make((1, 4), 5, widths=(3, 3))
    levels, codes = as_dtype(case.levels, torch.float32), random_codes(case)
    for change in (lambda: None, lambda: levels.phi_weights[0].mul_(2), lambda: levels.codebooks.neg_()):
        change()
        for phi_index in ((0, 1), (1, 0)):
            model = replace(levels, phi_index=phi_index)
            fast, plain = (api.decode(codes, model, backend=backend) for backend in ("triton", "reference"))
            torch.testing.assert_close(fast, plain)


def test_the_gradients_of_narrow_kernels_are_padded_with_zeros():
    case = CASES["unshared phi, masked"]
    arguments = (
        case.rows(torch.float32),
        case.mask,
        *case.levels.arguments(),
        None,
        True,
        False,
        True,
        "triton",
    )
    weights = torch.ops.aar_kernels.msrq_quantize(*arguments)[5]
    assert weights.shape == (3, 8, 8, 7)
    for gradient, width in zip(weights, (1, 7, 3), strict=True):
        margin = (7 - width) // 2
        assert gradient.count_nonzero() == gradient[..., margin : 7 - margin].numel()


def test_opcheck():
    case = make((1, 2), 3, dim=4, size=5, widths=(3,), batch=1)
    x = case.rows(torch.float32).contiguous().requires_grad_()
    arguments = (x, None, *case.levels.arguments(), None, True, True, True, "triton")
    torch.library.opcheck(torch.ops.aar_kernels.msrq_quantize, arguments)


interpreter.isolate(globals())
