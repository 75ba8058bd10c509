"""The compiled backend (csrc): packs weights for the kernels, keeps the packing while they stay, and calls.

For tensors on the CPU; those on a GPU go to `native_cuda`.

At inference the codebooks are packed for the integer screen and phi is tabulated per code; both are remembered until a
weight changes. In training codebooks and phi move at each step: a level's codebook is packed when its turn comes, or
searched as it is by few rows, and phi's products are computed for the codes in use alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._library import library
from ..cache import DerivedCache
from . import native_cuda
from .common import fold, later_rows

# Above this many bytes the rows of the codes in use are computed at each call instead of being tabulated.
TABLE_LIMIT = 512 * 2**20


def unavailable() -> str | None:
    return library.reason


def unsupported(problem) -> str | None:
    if problem.device == "cuda":
        return native_cuda.unsupported(problem)
    if problem.device != "cpu":
        return f"compiled for the CPU and CUDA, but tensors are on {problem.device}"
    if problem.dtype != torch.float32:
        return f"codebooks and phi must be float32, got {problem.dtype}"
    if problem.needs_grad:
        return "not differentiable; call it under torch.no_grad()"
    return None


class _Action(NamedTuple):
    """The arguments that tell the kernels what a code does to the sequence."""

    table: Tensor | None
    table_of: list[int]
    folded: Tensor | None
    bias: Tensor | None
    kernel_of: list[int]
    taps: int


_packed_codebooks: DerivedCache[list[Tensor]] = DerivedCache()
_actions: DerivedCache[_Action] = DerivedCache()
_folds: DerivedCache[_Action] = DerivedCache()
_projected: DerivedCache[tuple[Tensor, ...]] = DerivedCache()


def encode(x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths) -> Tensor:
    if codebooks.is_cuda:
        return native_cuda.encode(x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric)
    packed, action = _packed(codebooks, metric), _action(codebooks, phi_weights, phi_biases, lengths, phi_index)
    return torch.ops.aar_native.msrq_encode(
        x.contiguous(), _contiguous(mask), codebooks.contiguous(), lengths, widths, metric == "cosine", packed, *action
    )


def decode(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length) -> Tensor:
    if codebooks.is_cuda:
        return native_cuda.decode(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, length)
    f_hat = codebooks.new_zeros(codes.shape[0], length, codebooks.shape[2])
    _decode(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, widths, (0, len(lengths)), f_hat)
    return f_hat


def decode_scales(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length) -> Tensor:
    if codebooks.is_cuda:
        return native_cuda.decode_scales(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, length)
    f_hat = codebooks.new_zeros(codes.shape[0], length, codebooks.shape[2])
    scales = f_hat.new_empty(len(lengths), *f_hat.shape)
    _decode(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, widths, (0, len(lengths)), f_hat, scales)
    return scales


def next_scale_inputs(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length) -> Tensor:
    if codebooks.is_cuda:
        arguments = codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, length
        return native_cuda.next_scale_inputs(*arguments)
    f_hat = codebooks.new_zeros(codes.shape[0], length, codebooks.shape[2])
    inputs = f_hat.new_empty(codes.shape[0], sum(lengths[1:]), codebooks.shape[2])
    scales = (0, len(lengths))
    _decode(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, widths, scales, f_hat, None, inputs)
    return inputs


def step(
    f_hat, codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, scale
) -> tuple[Tensor, Tensor]:
    if codebooks.is_cuda:
        return native_cuda.step(f_hat, codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, scale)
    f_hat = f_hat.clone(memory_format=torch.contiguous_format)
    rows = lengths[scale + 1] if scale + 1 < len(lengths) else 0
    pooled = f_hat.new_empty(f_hat.shape[0], rows, f_hat.shape[2])
    scales = (scale, scale + 1)
    _decode(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, widths, scales, f_hat, None, pooled)
    return f_hat, pooled


def quantize(
    x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, samples, per_scale,
    want_statistics, want_phi_grad,
) -> tuple[Tensor, ...]:  # fmt: skip
    # `per_scale` changes the gradient alone, which ops.py takes care of.
    rows = x.shape[0] * x.shape[1] if mask is None else int(mask.sum())
    scale = 1 / (len(lengths) * max(rows, 1) * codebooks.shape[2])
    quantized, codes, squares, residual_sum, weight_grad, bias_grad, statistics = torch.ops.aar_native.msrq_quantize(
        x.contiguous(), _contiguous(mask), codebooks.contiguous(), [weight.contiguous() for weight in phi_weights],
        [bias.contiguous() for bias in phi_biases], lengths, phi_index, metric == "cosine", _contiguous(samples), scale,
        want_statistics, want_phi_grad,
    )  # fmt: skip
    loss = (2 * scale * squares.sum()).to(x.dtype)
    return quantized, codes, loss, statistics, residual_sum, weight_grad, bias_grad


def update(codebooks, cluster_size, embed_avg, statistics, decay, epsilon, dead_code_threshold) -> None:
    torch.ops.aar_native.msrq_update(
        codebooks, cluster_size, embed_avg, statistics, decay, epsilon, dead_code_threshold
    )
    # Writes of a custom operator leave version counters alone, and what was packed from these must not outlive them.
    torch.autograd.graph.increment_version((codebooks, cluster_size, embed_avg))


def encode_projected(
    x, codebooks, weight_in, bias_in, weight_out, bias_out, strides, metric
) -> tuple[Tensor, Tensor]:  # fmt: skip
    table, weight, bias = _projected.get(
        [codebooks, weight_in, bias_in, weight_out, bias_out],
        lambda: (later_rows(codebooks, weight_in, weight_out, bias_out), weight_in.flatten(0, 1).contiguous(),
                 bias_in.flatten().contiguous()),
    )  # fmt: skip
    state = torch.ops.aar_native.msrq_project(x.contiguous(), weight, bias).mT.contiguous()
    codes, rest = torch.ops.aar_native.msrq_encode_projected(
        state, codebooks.contiguous(), [x.shape[2] // stride for stride in strides], metric == "cosine",
        _packed(codebooks, metric), table,
    )  # fmt: skip
    # No level changes its own channels, or those of the levels before it: they are as it saw them.
    return codes, rest[..., : len(strides) * codebooks.shape[2]].mT.contiguous()


def decode_projected(codes, codebooks, weight_in, bias_in, weight_out, bias_out, strides, metric, length) -> Tensor:
    count = len(strides)
    weight, bias = _projected.get(
        [weight_out, bias_out],
        lambda: (weight_out[:count].permute(1, 0, 2).flatten(1).contiguous(), bias_out[:count].sum(0)), count,
    )  # fmt: skip
    lengths = [length // stride for stride in strides]
    rows = torch.ops.aar_native.msrq_gather(codes.contiguous(), codebooks.contiguous(), lengths, length)
    return torch.ops.aar_native.msrq_project(rows, weight, bias)


def _decode(
    codes, codebooks, phi_weights, phi_biases, lengths, phi_index, widths, scales, f_hat, each=None, pooled=None
) -> None:
    """Add the codes of scales ``scales[0]`` to ``scales[1]`` to f_hat, and fill what else is given."""
    if codes.is_floating_point():
        # Rows are a codebook of their own, each of them one of its codes. It has no table, being used once.
        batch, tokens, dim = codes.shape
        codebooks = codes.reshape(1, -1, dim)
        codes = torch.arange(batch * tokens, device=codes.device).view(batch, tokens)
        phi = phi_weights, phi_biases, phi_index
        action = _folds.get([*phi_weights, *phi_biases], lambda: _folded(*phi), *phi_index)
    else:
        action = _action(codebooks, phi_weights, phi_biases, lengths, phi_index)
    torch.ops.aar_native.msrq_decode(
        codes.contiguous(), codebooks.contiguous(), lengths, widths, *action, *scales, f_hat, each, pooled
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _folded(phi_weights: Sequence[Tensor], phi_biases: Sequence[Tensor], phi_index: Sequence[int]) -> _Action:
    """Phi's rows computed at each call, for the codes in use."""
    if not phi_weights:
        return _Action(None, [], None, None, [], 1)
    folded, bias = fold(phi_weights, phi_biases)
    return _Action(None, [], folded.permute(0, 3, 1, 2).contiguous(), bias, list(phi_index), folded.shape[1])


def _tabulated(codebooks, phi_weights, phi_biases, lengths, phi_index) -> _Action:
    """Phi's rows of every code in a table, unless it would be too large."""
    action = _folded(phi_weights, phi_biases, phi_index)
    of_scale = [(s if len(codebooks) > 1 else 0, phi_index[s]) for s in range(len(lengths))]
    pairs = list(dict.fromkeys(of_scale))  # one table for each codebook and kernel that meet
    shape = (len(pairs), codebooks.shape[1], action.taps, codebooks.shape[2])
    if 4 * math.prod(shape) > TABLE_LIMIT:
        return action
    table = codebooks.new_empty(shape)
    for out, (book, kernel) in zip(table, pairs, strict=True):
        out.copy_(torch.ops.aar_native.msrq_table(codebooks[book].contiguous(), action.folded[kernel], action.taps))
    return action._replace(table=table, table_of=[pairs.index(pair) for pair in of_scale])


def _packed(codebooks: Tensor, metric: str) -> list[Tensor]:
    """The codebooks in the form that the search reads, remembered until they change."""
    pack = torch.ops.aar_native.msrq_pack
    return _packed_codebooks.get([codebooks], lambda: pack(codebooks.contiguous(), metric == "cosine"), metric)


def _action(codebooks, phi_weights, phi_biases, lengths, phi_index) -> _Action:
    """What codes do to the sequence at inference, remembered until a weight changes."""
    if not phi_weights:
        return _folded((), (), ())
    weights = [codebooks, *phi_weights, *phi_biases]
    levels = codebooks, phi_weights, phi_biases, lengths, phi_index
    return _actions.get(weights, lambda: _tabulated(*levels), len(lengths), *phi_index)
