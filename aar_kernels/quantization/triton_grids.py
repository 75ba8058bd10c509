"""Quantizers of grids on Triton: a few launches a scale (kernels: `triton_grids_kernels`).

Pooling, search, interpolation and phi are a launch each: an item is shared by many programs, which keeps a GPU busy at
batch 1, and each of these needs what several of the one before made. phi is a product with its taps here, not a sum of
table rows: of a table a cell would read up to 48, more work than 9 D^2 multiplications are with the few channels that
images have. So there is no table to make or to keep, and rows stand for codes as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from .._triton import ASSERTING, assertions
from . import triton_grids_kernels as kernels
from .triton_host import searched

if TYPE_CHECKING:
    from .triton import _Levels


def encode(levels: _Levels, x: Tensor) -> Tensor:
    batch, _, dim = x.shape
    books, norms = searched(levels.codebooks, levels.metric, levels.memo())
    size, blocks = books.shape[1], kernels.SEARCH
    sound = x.isfinite().flatten(1).all(1)
    keys = torch.full((batch, levels.tokens), torch.iinfo(torch.int64).max, device=x.device)
    residual = x.masked_fill(~sound[:, None, None], 0)
    for s in levels.scales:
        n, (book, _) = levels.lengths[s], levels.pairs[s]
        rows = residual
        if _grid(levels, s) != _grid(levels, -1):
            rows = x.new_empty(batch, n, dim)
            _pool(levels, residual, s, rows)
        tiles = triton.cdiv(batch * n, blocks["BLOCK_M"])
        # Where the rows are few, the codes are what keeps the processors busy.
        part = blocks["BLOCK_N"] * max(triton.cdiv(size * tiles, kernels.PROGRAMS * blocks["BLOCK_N"]), 1)
        kernels.search_kernel[tiles, triton.cdiv(size, part)](
            keys, rows, sound, books[book], norms[book], batch * n, n, size, part, levels.tokens, _offset(levels, s),
            D=dim, COSINE=levels.metric == "cosine", BLOCK_D=triton.next_power_of_2(dim), **blocks,
        )  # fmt: skip
        if s != levels.scales[-1]:
            _act(levels, s, keys, residual, residual, sign=-1.0, check=False)
    return (keys << 32) >> 32  # the code, without the distance above it


def decode(levels: _Levels, codes: Tensor) -> Tensor:
    out = _images(levels, codes)
    for s in levels.scales:
        _act(levels, s, codes, out if s else None, out)
    return out


def decode_scales(levels: _Levels, codes: Tensor) -> Tensor:
    out = _images(levels, codes, len(levels.scales))
    for s in levels.scales:
        _act(levels, s, codes, out[s - 1] if s else None, out[s])
    return out


def next_scale_inputs(levels: _Levels, codes: Tensor) -> Tensor:
    f_hat, first = _images(levels, codes), levels.lengths[0]
    out = f_hat.new_empty(len(codes), levels.tokens - first, f_hat.shape[2])
    for s in levels.scales[:-1]:
        _act(levels, s, codes, f_hat if s else None, f_hat)
        _pool(levels, f_hat, s + 1, out, _offset(levels, s + 1) - first)
    return out


def step(levels: _Levels, f_hat: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    out, following = torch.empty_like(f_hat), sum(levels.lengths[scale + 1 : scale + 2])
    pooled = f_hat.new_empty(len(f_hat), following, f_hat.shape[2])
    _act(levels, scale, codes.contiguous(), f_hat, out, offset=0)
    if following:
        _pool(levels, out, scale + 1, pooled)
    return out, pooled


def _images(levels: _Levels, codes: Tensor, *leading: int) -> Tensor:
    return levels.codebooks.new_empty(*leading, len(codes), levels.lengths[-1], levels.codebooks.shape[2])


def _grid(levels: _Levels, scale: int) -> tuple[int, int]:
    """Height and width."""
    width = levels.widths[scale]
    return levels.lengths[scale] // width, width


def _offset(levels: _Levels, scale: int) -> int:
    return sum(levels.lengths[:scale])


def _pool(levels: _Levels, images: Tensor, scale: int, out: Tensor, offset: int = 0) -> None:
    """``images[B, T, D]`` pooled to the tokens of a scale, ``out[B, :, D]`` from ``offset`` on."""
    batch, _, dim = images.shape
    kernels.pool_kernel[(batch * levels.lengths[scale],)](
        out, images, *_grid(levels, -1), *_grid(levels, scale), out.shape[1], offset,
        D=dim, **kernels.cell_blocks(dim),
    )


def _act(
    levels: _Levels, scale: int, tokens: Tensor, base: Tensor | None, out: Tensor, *, sign: float = 1.0,
    offset: int | None = None, check: bool = True,
) -> None:  # fmt: skip
    """``out[B, T, D]`` = ``base``, or nothing, plus ``sign`` times what the tokens of a scale contribute.

    Args:
        tokens: ``[B, tokens]`` codes or keys, or rows ``[B, tokens, D]``, those of the scale from ``offset`` on: where
            they stand among all unless given.
        check: those of all scales, with the first.
    """
    batch, length, dim = out.shape
    offset = _offset(levels, scale) if offset is None else offset
    book, kernel = levels.pairs[scale]
    codes, rows = (None, tokens) if tokens.is_floating_point() else (tokens, levels.codebooks.contiguous()[book])
    checked = tokens.numel() if check and offset == 0 else 0
    phi, blocks = len(levels.phi_weights) > 0, kernels.cell_blocks(dim)
    image = torch.empty_like(out) if phi else out
    with assertions():
        kernels.up_kernel[(triton.cdiv(batch * length, blocks["BLOCK_M"]),)](
            image, None if phi else base, codes, rows, batch * length, *_grid(levels, -1), *_grid(levels, scale),
            tokens.shape[1], offset, checked, levels.codebooks.shape[1], D=dim, SIGN=sign, **blocks, **ASSERTING,
        )  # fmt: skip
    if phi:
        (weights, biases), blocks = levels.folded, kernels.PHI
        kernels.phi_kernel[triton.cdiv(batch * length, blocks["BLOCK_M"]), triton.cdiv(dim, blocks["BLOCK_N"])](
            out, base, image, weights[kernel], biases[kernel], batch * length, *_grid(levels, -1),
            D=dim, SIDE=levels.taps, SIGN=sign, **blocks,
        )  # fmt: skip
