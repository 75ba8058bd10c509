"""What the CUDA kernels of csrc read: codebooks packed for the tensor cores, and phi tabulated per code.

Plain PyTorch, in float64 where it is computed, so that neither TF32 nor autocast changes it; runs on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import DerivedCache
from .common import fold

MAX_DIM, MAX_SCALES = 128, 128  # kMaxDim and kMaxScales of csrc/cuda/msrq.h
TILE = 32  # kTileCodes


class Packed(NamedTuple):
    """`Packed` of csrc/cuda/msrq.h."""

    fragments: Tensor
    half_squares: Tensor
    exact: Tensor
    bound: Tensor


class Tables(NamedTuple):
    """How codes act on the sequence: ``rows[tables, K, taps, D]``, ``bias[kernels, D]``; which of both a scale uses."""

    rows: Tensor
    bias: Tensor | None
    taps: int
    table_of: list[int]
    kernel_of: list[int]


_packed: DerivedCache[Packed] = DerivedCache()
_tables: DerivedCache[Tables] = DerivedCache()


def padded_dim(dim: int) -> int:
    return 32 if dim <= 32 else 64 if dim <= 64 else 128


def pack(codebooks: Tensor, metric: str) -> Packed:
    """``codebooks[E, K, D]`` as the search reads them.

    A lane of a warp holds, of code ``lane // 4`` of eight, channels ``4 * (lane % 4)`` to ``+ 3`` of each step of 16;
    two steps together are one load of 16 bytes.
    """
    books, size, dim = codebooks.shape
    double = codebooks.double()
    if metric == "cosine":
        double = F.normalize(double, dim=-1)
    exact = double.float().contiguous()
    double = exact.double()
    rounded = exact.bfloat16()
    error = (double - rounded.double()).norm(dim=-1)
    halves = double.square().sum(-1) / 2 if metric == "euclidean" else torch.zeros_like(error)
    largest = torch.stack([rounded.double().norm(dim=-1) + error, error, halves]).amax(-1)
    bound = (largest.T * (1 + 2**-20)).float().contiguous()

    width, rows = padded_dim(dim), math.ceil(size / TILE) * TILE
    wide = F.pad(rounded, (0, width - dim, 0, rows - size))
    steps = wide.view(books, rows // 8, 8, width // 32, 2, 4, 4)  # code, two steps, quarter, channel
    fragments = steps.permute(0, 1, 3, 2, 5, 4, 6).contiguous()
    return Packed(fragments, F.pad(halves.float(), (0, rows - size), value=math.inf), exact, bound)


def tabulate(codebooks: Tensor, phi_weights, phi_biases, lengths, phi_index) -> Tables:
    """The rows through which each code acts (`common.fold`): one table for each codebook and kernel that meet."""
    books = [s if len(codebooks) > 1 else 0 for s in range(len(lengths))]
    if not phi_weights:
        return Tables(codebooks.contiguous(), None, 1, books, [0] * len(lengths))
    folded, bias = fold([weight.double() for weight in phi_weights], [b.double() for b in phi_biases])
    taps, dim = folded.shape[1], folded.shape[2]
    of_scale = list(zip(books, phi_index, strict=True))
    pairs = list(dict.fromkeys(of_scale))
    rows = codebooks.new_empty(len(pairs), codebooks.shape[1], taps * dim)
    for out, (book, kernel) in zip(rows, pairs, strict=True):
        out.copy_(codebooks[book].double() @ folded[kernel].flatten(0, 1).T)
    return Tables(rows, bias.float(), taps, [pairs.index(pair) for pair in of_scale], list(phi_index))


def packed_of(codebooks: Tensor, metric: str) -> Packed:
    return _remember(_packed, [codebooks], lambda: pack(codebooks, metric), metric)


def tables_of(codebooks, phi_weights, phi_biases, lengths: Sequence[int], phi_index: Sequence[int]) -> Tables:
    weights = [codebooks, *phi_weights, *phi_biases]
    build = lambda: tabulate(codebooks, phi_weights, phi_biases, lengths, phi_index)  # noqa: E731
    return _remember(_tables, weights, build, len(lengths), *phi_index)


def _remember(cache: DerivedCache, weights: list[Tensor], build, *options):
    """A value of ``cache``, one for each CUDA stream: another stream would have to wait for the one that builds.

    Under CUDA-graph capture a new one, that the graph keeps: it would otherwise go on reading memory that the cache gives
    up when a weight changes.
    """
    if not weights[0].is_cuda:
        return cache.get(weights, build, *options)
    if torch.cuda.is_current_stream_capturing():
        return build()
    return cache.get(weights, build, torch.cuda.current_stream(), *options)
