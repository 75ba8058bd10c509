"""Quantizers with inputs for them, and the replay of a backend's codes through the reference."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from helpers import MARGINS, assert_as_accurate
from torch import Tensor

from aar_kernels import ScaleSchedule, quantization
from aar_kernels.quantization import Levels, phi_sharing_index, reference

LATENTS = (64, 1, 3, 128, 8, 16, 100)
SIZES = (1024, 7, 100, 1, 32)
BATCHES = (5, 1, 33, 2, 0, 3)
SCHEDULES = ("multiscale", "unordered", "one scale", "plain")
PHI = ("partial", "full", "none", "absent")
MASKS = ("absent", "prefix", "holes")


@dataclass
class Case:
    """A quantizer and an input ``x[B, latent, T]`` for it."""

    levels: Levels
    x: Tensor
    mask: Tensor | None

    @property
    def length(self) -> int:
        return self.x.shape[2]

    def rows(self, dtype: torch.dtype) -> Tensor:
        return self.x.mT.to(dtype)


def make_case(seed: int | str, **chosen) -> Case:
    """The random case of ``seed``, or ``"published"``. Options are walked at different strides, so that every
    one is met, and most pairs.

    Args:
        chosen: options to set by hand, by the names of the local variables: ``latent=64, masked="absent"``.
    """
    if seed == "published":
        return published_case()
    rng = random.Random(seed)
    options = {
        "latent": LATENTS[seed % 7], "size": SIZES[seed % 5], "batch": BATCHES[seed % 6],
        "kind": SCHEDULES[seed % 4], "sharing": PHI[seed // 4 % 4], "masked": MASKS[seed // 3 % 3],
        "metric": ("euclidean", "cosine")[seed // 5 % 2], "shared": seed // 7 % 3 == 1,
        "stretch": (0, 7, -3)[seed // 2 % 3],
    }  # fmt: skip
    assert chosen.keys() <= options.keys()
    options |= chosen
    generator = torch.Generator().manual_seed(seed)

    finest = rng.randint(6, 27)
    lengths = {
        "multiscale": ScaleSchedule.quadratic(rng.randint(2, 8), finest).lengths,
        "unordered": [rng.randint(1, finest) for _ in range(rng.randint(2, 7))],
        "one scale": [finest],
        "plain": [finest] * rng.randint(2, 5),
    }[options["kind"]]
    scales, latent, batch = len(lengths), options["latent"], options["batch"]
    length = max(1, lengths[-1] + options["stretch"])

    x = torch.randn(
        batch, length, latent, generator=generator
    ).mT  # channels last in memory, as a projection leaves it
    codebooks = (
        torch.randn(1 if options["shared"] else scales, options["size"], latent, generator=generator) / 3
    )
    kernels = {"partial": min(3, scales), "full": 1, "none": scales, "absent": 0}[options["sharing"]]
    index = {
        "partial": phi_sharing_index(max(kernels, 1), scales),
        "full": (0,) * scales,
        "none": range(scales),
    }
    widths = [rng.choice((1, 3, 5, 7, 9)) for _ in range(kernels)]
    weights = [torch.randn(latent, latent, k, generator=generator) / (latent * k) ** 0.5 for k in widths]
    biases = [torch.randn(latent, generator=generator) / 10 for _ in widths]
    levels = Levels(
        ScaleSchedule(lengths),
        codebooks,
        weights,
        biases,
        index.get(options["sharing"], ()),
        options["metric"],
    )
    return Case(levels, x, _mask(options["masked"], batch, length, generator))


def published_case() -> Case:
    """The published sizes, where sums are long: 16 scales of 75 frames, latent 64, 1024 codes, six kernels of
    nine."""
    schedule, generator = ScaleSchedule.quadratic(16, 75), torch.Generator().manual_seed(0)
    codebooks = torch.randn(16, 1024, 64, generator=generator) / 3
    weights = [torch.randn(64, 64, 9, generator=generator) / 24 for _ in range(6)]
    biases = [torch.randn(64, generator=generator) / 10 for _ in range(6)]
    levels = Levels(schedule, codebooks, weights, biases, phi_sharing_index(6, 16))
    return Case(levels, torch.randn(8, 75, 64, generator=generator).mT, None)


def near_ties(metric: str) -> Case:
    """Rows on the border between two codes, but for a few roundings: float32 and float64 often choose
    differently."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(1, 50, 16, generator=generator)
    if metric == "cosine":
        codebook = codebook / codebook.norm(dim=2, keepdim=True)
    pairs = torch.randint(50, (2, 400), generator=generator)
    middle = codebook[0][pairs].mean(dim=0)
    rows = middle * (1 + 4e-7 * torch.randn(middle.shape, generator=generator))
    return Case(Levels(ScaleSchedule([400]), codebook, metric=metric), rows[None].mT, None)


def _mask(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor | None:
    """One item of a prefix mask is padding alone, and one is not padded."""
    if kind == "absent":
        return None
    if kind == "holes":
        return torch.rand(batch, length, generator=generator) < 0.6
    frames = torch.randint(1, length + 1, (batch,), generator=generator)
    frames[:1], frames[1:2] = 0, length
    return torch.arange(length) < frames[:, None]


def as_dtype(levels: Levels, dtype: torch.dtype) -> Levels:
    """The same quantizer, its weights fresh leaves."""
    weights = {
        "codebooks": levels.codebooks.detach().to(dtype, copy=True),
        "phi_weights": [weight.detach().to(dtype, copy=True) for weight in levels.phi_weights],
        "phi_biases": [bias.detach().to(dtype, copy=True) for bias in levels.phi_biases],
    }
    return dataclasses.replace(levels, **weights)


def replay(codes: Tensor, levels: Levels, function, *args):
    """``function(*args)`` of the reference with ``codes`` for the outcome of every search.

    A near tie that rounding decides the other way changes all that follows, so a backend's numbers are
    compared along its own codes, and the codes by `assert_codes`.

    Returns:
        the function's result and, per scale, the rows that were searched ``[B, n, D]`` and the codebook.
    """
    parts, searched = iter(codes.split(list(levels.schedule.lengths), dim=1)), []

    def search(rows: Tensor, codebook: Tensor, metric: str) -> Tensor:
        searched.append((rows, codebook))
        return next(parts).clamp(min=0)

    with mock.patch.object(reference, "search", search):
        return function(*args), searched


def assert_decoding(tokens: Tensor, case: Case, name: str, backend: str) -> None:
    """``name`` of these codes, or rows, is as accurate as plain PyTorch."""
    function, double = getattr(quantization, name), as_dtype(case.levels, torch.float64)
    ours, plain = (function(tokens, case.levels, backend=each) for each in (backend, "reference"))
    exact = function(tokens.double() if tokens.is_floating_point() else tokens, double, backend="reference")
    assert_as_accurate(ours, plain, exact)


def assert_steps(tokens: Tensor, case: Case, backend: str) -> None:
    """The same of each scale's step, from the case's ``x``."""
    double, f_hat = as_dtype(case.levels, torch.float64), case.rows(torch.float32)
    for s, part in enumerate(tokens.split(list(case.levels.schedule.lengths), dim=1)):
        ours, plain = (quantization.step(s, f_hat, part, case.levels, backend=each) for each in (backend, "reference"))
        part = part.double() if part.is_floating_point() else part
        exact = quantization.step(s, f_hat.double(), part, double, backend="reference")
        assert_as_accurate(ours[0], plain[0], exact[0], f"f_hat after scale {s}")
        assert_as_accurate(ours[1], plain[1], exact[1], f"input of scale {s + 1}")


def assert_codes(codes: Tensor, case: Case) -> None:
    """Each code is as near, in float64, as the nearest one, but for what rounding in the dtype can hide.

    Let r be the row in float64, r + d the row in the dtype, c the code chosen and b the nearest. The search
    compares
    |c|^2 - 2 (r + d).c with the same of b, each off by at most (D + 4) u (|r| + |c|)^2, u being half an eps:
    any order of a sum of D products has that bound. So c is farther than b by no more than 2 |d| |c - b| plus
    the two errors.
    """
    single, double = case.levels, as_dtype(case.levels, torch.float64)
    assert codes.shape == (len(case.x), single.schedule.total)
    assert codes.dtype == torch.int64
    run = [
        replay(
            codes, levels, reference.encode, case.rows(levels.codebooks.dtype), case.mask, *levels.arguments()
        )
        for levels in (single, double)
    ]
    (expected, plain), (_, exact) = run
    # The reference says which tokens have no code; the others are left as they were replayed.
    assert torch.equal(codes, expected)
    parts = codes.split(list(single.schedule.lengths), dim=1)
    for part, (row32, _), (row, book) in zip(parts, plain, exact, strict=True):
        assert_nearest(part, row32, row, book, case.levels.metric)


def assert_nearest(codes: Tensor, row32: Tensor, row: Tensor, book: Tensor, metric: str) -> None:
    """The part of `assert_codes` about one scale: codes ``[B, n]``, rows ``[B, n, D]`` in the dtype and in float64, and
    the codebook in float64."""
    unit, valid = torch.finfo(row32.dtype).eps / 2, codes >= 0
    row, row32, chosen = row[valid], row32[valid].double(), codes[valid]
    if not len(row):
        return
    norm = row.norm(dim=1)
    # As everywhere, a backend may be twice as far off as plain PyTorch, and one rounding.
    moved = 2 * ((row32 - row).norm(dim=1).max() + 2 * unit * norm.max())
    if metric == "cosine":
        moved = (2 * moved / norm).clamp(max=2)
        row, book = F.normalize(row, dim=1), F.normalize(book, dim=1)
        norm = torch.ones_like(norm)
    distance = torch.cdist(row, book, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = distance.argmin(dim=1)  # the first of equals
    excess = (distance.gather(1, chosen[:, None]) - distance.gather(1, nearest[:, None]))[:, 0]
    sums = sum((norm + book[code].norm(dim=1)).square() for code in (chosen, nearest))
    bound = 2 * moved * (book[chosen] - book[nearest]).norm(dim=1) + (row.shape[1] + 4) * unit * sums
    worst = (excess / bound).max().item()
    assert worst <= 1, f"a code is {worst:.3g} times as much too far away as rounding explains"
    MARGINS.append((len(chosen), int((chosen != nearest).sum()), worst))
