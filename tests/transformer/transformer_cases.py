"""Random transformers that take a random schedule scale by scale, and how their results are judged."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from helpers import assert_as_accurate
from torch import Tensor

import aar_kernels as ak
from aar_kernels.linear import PackedWeight, pack
from aar_kernels.transformer import Block, reference, step

DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class Case(NamedTuple):
    parts: list[Tensor]  # the tokens of each scale, [B, n, C]
    blocks: list[Block]
    modulations: list[Tensor]
    heads: int
    softmax_scale: float | None

    def caches(self, dtype: torch.dtype = torch.float32, room: int = 0) -> list[ak.ScaleCache]:
        batch, _, channels = self.parts[0].shape
        total = sum(part.shape[1] for part in self.parts) + room
        sizes = (batch, total, self.heads, channels // self.heads)
        return [ak.ScaleCache.empty(*sizes, dtype=dtype) for _ in self.blocks]


def make_case(seed: int, dtype: torch.dtype | None = None, **sizes) -> Case:
    """Sizes that are not given, the dtype of the weights and the kind of attention are drawn from ``seed``."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    drawn = {
        "batch": chance.choice((1, 2, 3)), "heads": chance.choice((1, 2, 3)), "head_dim": chance.choice((8, 20, 64)),
        "hidden": chance.choice((1, 50, 130)), "depth": chance.choice((1, 2, 3)), "cosine": chance.random() < 0.5,
        "lengths": sorted(chance.sample((1, 2, 4, 7, 13, 26), 3)),
    } | sizes  # fmt: skip
    channels, hidden, dtype = drawn["heads"] * drawn["head_dim"], drawn["hidden"], dtype or chance.choice(DTYPES)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def make_block() -> Block:
        shapes = ((3 * channels, channels), (channels, channels), (hidden, channels), (channels, hidden))
        weights = [pack(draw(N, K) / K**0.5, dtype=dtype) for N, K in shapes]
        log_scale = draw(drawn["heads"]) + 3 if drawn["cosine"] else None
        return Block(*weights, tuple(draw(N) for N, _ in shapes), log_scale)

    blocks = [make_block() for _ in range(drawn["depth"])]
    batch = drawn["batch"]
    modulations = [*(0.3 * draw(batch, 6 * channels) for _ in blocks), draw(batch, 2 * channels)]
    parts = [draw(batch, n, channels) for n in drawn["lengths"]]
    return Case(parts, blocks, modulations, drawn["heads"], chance.choice((None, 0.3)))


def run(case: Case, backend: str) -> list[Tensor]:
    """The results of all scales, and the caches after them."""
    caches = case.caches()
    results = [
        step(part, case.blocks, case.modulations, caches, softmax_scale=case.softmax_scale, backend=backend)
        for part in case.parts
    ]
    return results + [tensor for cache in caches for tensor in (cache.k, cache.v)]


def layer_by_layer(case: Case, backend: str) -> list[Tensor]:
    """The same by the operators of the layers."""
    caches, results = case.caches(), []
    head_dim = case.parts[0].shape[2] // case.heads
    plain = 1.0 if case.blocks[0].head_log_scale is not None else head_dim**-0.5
    scale = plain if case.softmax_scale is None else case.softmax_scale
    for part in case.parts:
        results.append(reference.step(part, case.blocks, case.modulations, caches, scale, 1e-6, backend))
        for cache in caches:
            cache.length += part.shape[1]
    return results + [tensor for cache in caches for tensor in (cache.k, cache.v)]


def exact(case: Case) -> list[Tensor]:
    """In float64, of the numbers that the packed weights stand for."""

    def widened(weight: PackedWeight) -> PackedWeight:
        return weight._replace(data=pack(weight.dequantize()).data, scale=None)

    blocks = [
        Block(*map(widened, block.weights), biases=block.biases, head_log_scale=block.head_log_scale)
        for block in case.blocks
    ]
    modulations, caches = [modulation.double() for modulation in case.modulations], case.caches(torch.float64)
    options = {"softmax_scale": case.softmax_scale, "backend": "reference"}
    results = [step(part.double(), blocks, modulations, caches, **options) for part in case.parts]
    return results + [tensor for cache in caches for tensor in (cache.k, cache.v)]


def check(case: Case, backend: str) -> None:
    names = [f"scale {i}" for i in range(len(case.parts))] + [f"cache {i}" for i in range(2 * len(case.blocks))]
    for name, *results in zip(names, run(case, backend), run(case, "reference"), exact(case), strict=True):
        assert_as_accurate(*results, what=name)
