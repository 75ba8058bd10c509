"""The compiled backend on a GPU (csrc/cuda): one launch for each operator.

What the kernels read of the weights, codebooks packed for the tensor cores and phi tabulated per code, is made in plain
PyTorch, in float64 so that neither TF32 nor autocast changes it, and remembered until a weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import library
from ..cache import DerivedCache
from ..graph import captured_elsewhere, keep
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


def unsupported(problem) -> str | None:
    if library.cuda_reason is not None:
        return library.cuda_reason
    if problem.operator in ("msrq_quantize", "msrq_update"):
        return "inference only on CUDA"
    if problem.operator in ("msrq_encode_projected", "msrq_decode_projected"):
        return "factorised quantizers run on the CPU alone"
    if problem.needs:
        return f"{' and '.join(problem.needs)} run on the CPU alone"
    if problem.dtype != torch.float32:
        return f"codebooks and phi must be float32, got {problem.dtype}"
    if problem.needs_grad:
        return "not differentiable; call it under torch.no_grad()"
    if problem.dim > MAX_DIM:
        return f"at most {MAX_DIM} channels on CUDA, got {problem.dim}"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    return None


def encode(x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric) -> Tensor:
    packed = packed_of(codebooks, metric)
    rows, bias, taps, table_of, kernel_of = tables_of(codebooks, phi_weights, phi_biases, lengths, phi_index)
    mask = None if mask is None else mask.contiguous()
    return torch.ops.aar_native.msrq_encode_cuda(
        x.contiguous(), mask, lengths, metric == "cosine", *packed, rows, bias, taps, table_of, kernel_of
    )


def decode(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, length) -> Tensor:
    f_hat = codebooks.new_empty(codes.shape[0], length, codebooks.shape[2])
    scales = (0, len(lengths))
    _decode(codes, None, codebooks, phi_weights, phi_biases, lengths, phi_index, scales, f_hat)
    return f_hat


def decode_scales(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, length) -> Tensor:
    f_hat = codebooks.new_empty(codes.shape[0], length, codebooks.shape[2])
    each, scales = f_hat.new_empty(len(lengths), *f_hat.shape), (0, len(lengths))
    _decode(codes, None, codebooks, phi_weights, phi_biases, lengths, phi_index, scales, f_hat, each)
    return each


def next_scale_inputs(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, length) -> Tensor:
    f_hat = codebooks.new_empty(codes.shape[0], length, codebooks.shape[2])
    pooled, scales = f_hat.new_empty(codes.shape[0], sum(lengths[1:]), f_hat.shape[2]), (0, len(lengths))
    _decode(codes, None, codebooks, phi_weights, phi_biases, lengths, phi_index, scales, f_hat, None, pooled)
    return pooled


def step(f_hat, codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, scale) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(f_hat, memory_format=torch.contiguous_format)
    pooled = out.new_empty(out.shape[0], sum(lengths[scale + 1 : scale + 2]), out.shape[2])
    scales = (scale, scale + 1)
    _decode(codes, f_hat, codebooks, phi_weights, phi_biases, lengths, phi_index, scales, out, None, pooled)
    return out, pooled


def _decode(
    codes, base, codebooks, phi_weights, phi_biases, lengths, phi_index, scales, f_hat, each=None, pooled=None
) -> None:
    """The codes of scales ``scales[0]`` to ``scales[1]`` on top of ``base``, to f_hat; and fill what else is given."""
    rows, bias, taps, table_of, kernel_of = tables_of(codebooks, phi_weights, phi_biases, lengths, phi_index)
    books, size, _ = codebooks.shape
    base = None if base is None else base.contiguous()
    torch.ops.aar_native.msrq_decode_cuda(
        codes.contiguous(), base, lengths, books, size, rows, bias, taps, table_of, kernel_of, *scales, f_hat, each,
        pooled,
    )  # fmt: skip


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
    half_squares = F.pad(halves.float(), (0, rows - size), value=math.inf)
    return Packed(fragments, half_squares, F.pad(exact, (0, width - dim)), bound)


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

    Under a capture that does not `keep` it a new one, which is the graph's: that would otherwise go on reading memory
    that the cache gives up when a weight changes.
    """
    if not weights[0].is_cuda:
        return cache.get(weights, build, *options)
    if captured_elsewhere():
        return build()
    return keep(cache.get(weights, build, torch.cuda.current_stream(), *options))
