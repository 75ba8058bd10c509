"""Factorised quantizers with inputs for them, and how their codes are judged."""

from __future__ import annotations

import dataclasses
import math
import random
from unittest import mock

import torch
from quantization.cases import assert_nearest
from torch import Tensor

from aar_kernels.quantization import ProjectedLevels, reference

DIMS = (8, 3, 1, 16)
SIZES = (100, 1024, 7, 32, 1)
CHANNELS = (32, 5, 300, 130)
BATCHES = (3, 1, 8, 2, 0)
STRIDES = ((1,), (4, 2, 1), (2, 1), (1, 3))


def make_projected(seed: int) -> tuple[ProjectedLevels, Tensor]:
    """The quantizer of ``seed`` and ``x[B, channels, T]``; each level's codes are smaller than those before."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dim, size, channels, batch = DIMS[seed % 4], SIZES[seed % 5], CHANNELS[seed // 2 % 4], BATCHES[seed % 5]
    books = rng.randint(1, 6)
    pattern = STRIDES[seed // 3 % 4]
    strides = [pattern[s % len(pattern)] for s in range(rng.randint(1, books))]
    length = math.lcm(*strides) * rng.randint(1, 12)
    shrink = 0.7 ** torch.arange(books)[:, None, None]

    def random_(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    levels = ProjectedLevels(
        random_(books, size, dim), random_(books, dim, channels) / channels**0.5, random_(books, dim) / 10,
        random_(books, channels, dim) / dim**0.5 * shrink, random_(books, channels) / 10, strides,
        ("cosine", "euclidean")[seed // 5 % 2],
    )  # fmt: skip
    return levels, random_(batch, channels, length)


def projected_as(levels: ProjectedLevels, dtype: torch.dtype) -> ProjectedLevels:
    """The same quantizer, its weights fresh leaves."""
    names = ("codebooks", "weight_in", "bias_in", "weight_out", "bias_out")
    return dataclasses.replace(levels, **{name: getattr(levels, name).detach().to(dtype, copy=True) for name in names})


def replay_projected(codes: Tensor, x: Tensor, levels: ProjectedLevels) -> tuple[tuple[Tensor, Tensor], list]:
    """`reference.encode_projected` along these codes: its result, and per level the rows searched and the codebook."""
    parts, searched = iter(codes.split(levels.lengths(x.shape[2]), dim=1)), []

    def search(rows: Tensor, codebook: Tensor, metric: str) -> Tensor:
        searched.append((rows, codebook))
        return next(parts).clamp(min=0)

    with mock.patch.object(reference, "search", search):
        return reference.encode_projected(x.to(levels.codebooks.dtype), *levels.arguments()), searched


def assert_projected_codes(codes: Tensor, levels: ProjectedLevels, x: Tensor) -> None:
    """As `assert_codes`: each code is as near, in float64, as the nearest one, but for what rounding can hide."""
    assert codes.shape == (len(x), sum(levels.lengths(x.shape[2])))
    assert codes.dtype == torch.int64
    (expected, _), plain = replay_projected(codes, x, levels)
    assert torch.equal(codes, expected)  # -1 where it should be
    _, exact = replay_projected(codes, x, projected_as(levels, torch.float64))
    parts = codes.split(levels.lengths(x.shape[2]), dim=1)
    for part, (row32, _), (row, book) in zip(parts, plain, exact, strict=True):
        assert_nearest(part, row32, row, book, levels.metric)
