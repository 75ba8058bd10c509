"""Factorised quantizers on Triton: two launches to encode, one to decode (kernels: `triton_projected_kernels`)."""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
from torch import Tensor

from .._triton import ASSERTING, assertions
from . import triton_projected_kernels as kernels
from .common import later_rows
from .triton_host import Memo, operator, searched, upload


@operator
def encode_projected(
    x, codebooks, weight_in, bias_in, weight_out, bias_out, strides, metric
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, channels, length = x.shape
    _, size, dim = codebooks.shape
    memo = Memo(codebooks, weight_in, bias_in, weight_out, bias_out)
    table = memo(lambda: later_rows(codebooks, weight_in, weight_out, bias_out), "later rows")
    books, norms = searched(codebooks, metric, memo)
    layout, tokens = _layout(strides, length, x.device)
    rows = len(strides) * dim
    projected, codes = x.new_empty(batch, rows, length), x.new_empty(batch, tokens, dtype=torch.int64)
    sound = x.isfinite().flatten(1).all(1)
    blocks = kernels.PROJECT
    kernels.project_kernel[batch, triton.cdiv(length, blocks["BLOCK_T"]), triton.cdiv(rows, blocks["BLOCK_N"])](
        projected, x, weight_in.contiguous(), bias_in.contiguous(), channels, length, rows, **blocks
    )
    tile = kernels.tile(strides)
    kernels.levels_kernel[batch, triton.cdiv(length, tile)](
        projected, x.new_empty(batch, length, dim), codes, sound, books, norms, table, layout, length, size, tokens,
        len(strides), table.shape[2], tile, D=dim, COSINE=metric == "cosine", **kernels.search_blocks(dim),
    )  # fmt: skip
    return codes, projected


@operator
def decode_projected(codes, codebooks, weight_in, bias_in, weight_out, bias_out, strides, metric, length) -> Tensor:
    (batch, tokens), (_, size, dim), channels = codes.shape, codebooks.shape, weight_out.shape[1]
    count = len(strides)
    bias = Memo(bias_out)(lambda: bias_out[:count].sum(0), "sum", count)
    layout, _ = _layout(strides, length, codes.device)
    out = codebooks.new_empty(batch, channels, length)
    blocks = kernels.decode_blocks(dim)
    grid = batch, triton.cdiv(length, blocks["BLOCK_T"]), triton.cdiv(channels, blocks["BLOCK_N"])
    with assertions():
        kernels.decode_kernel[grid](
            out, codes, codebooks.contiguous(), weight_out.contiguous(), bias, layout, channels, length, size, tokens,
            count, D=dim, **blocks, **ASSERTING,
        )  # fmt: skip
    return out


def _layout(strides: list[int], length: int, device: torch.device) -> tuple[Tensor, int]:
    """The kernels' ``layout`` of these levels on ``length`` frames, and how many tokens that makes."""
    lengths = [length // stride for stride in strides]
    offsets = [0, *accumulate(lengths)]
    return upload(list(zip(strides, offsets, strict=False)), torch.int32, device), offsets[-1]
