"""Triton backend: a portable GPU implementation in few launches (kernels and block sizes: `triton_kernels`).

encode and quantize run all scales of an item in one program; the decoding operators run one program per block
of frames. phi is applied through tables of codes (`triton_kernels.table_kernel`), which inference keeps until
a weight changes. No kernel adds by atomics, so results do not vary from run to run; the statistics are summed by
``index_add_``, which follows ``torch.use_deterministic_algorithms``. Quantizers of grids are in `triton_grids`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .._triton import ASSERTING, assertions, unavailable, wrong_device  # noqa: F401
from . import triton_grids as grids
from . import triton_kernels as kernels
from .common import fold
from .triton_host import Memo, operator, searched, upload
from .triton_projected import decode_projected, encode_projected  # noqa: F401

TABLE_LIMIT = 512 << 20  # bytes of tables that may exist at once; beyond it they are built scale by scale
INT32_MAX = (1 << 31) - 1


def unsupported(problem) -> str | None:
    if reason := wrong_device(problem):
        return reason
    if problem.needs and "grids" not in problem.needs:
        return f"{' and '.join(problem.needs)} of sequences run on the reference, and compiled on the CPU"
    if problem.dtype != torch.float32:
        return f"float32 codebooks only, got {problem.dtype}"
    if problem.needs_grad:
        return "not differentiable; the reference is"
    return None


@operator
def encode(x, mask, *levels) -> Tensor:
    levels = _Levels(*levels)
    if levels.widths:
        return grids.encode(levels, x)
    codes = x.new_empty(x.shape[0], levels.tokens, dtype=torch.int64)
    rows = x.new_empty(x.shape[0], max(levels.lengths), x.shape[2])
    _run_scales(levels, x, mask, codes, rows, levels.memo())
    return codes


@operator
def decode(codes, *levels_and_length) -> Tensor:
    *levels, length = levels_and_length
    levels = _Levels(*levels)
    return grids.decode(levels, codes) if levels.widths else _decode(levels, codes, length, levels.scales)


@operator
def decode_scales(codes, *levels_and_length) -> Tensor:
    *levels, length = levels_and_length
    levels = _Levels(*levels)
    if levels.widths:
        return grids.decode_scales(levels, codes)
    return _decode(levels, codes, length, levels.scales, keep_scales=True)


@operator
def next_scale_inputs(codes, *levels_and_length) -> Tensor:
    *levels, length = levels_and_length
    levels = _Levels(*levels)
    if levels.widths:
        return grids.next_scale_inputs(levels, codes)
    return _pool(
        levels, _decode(levels, codes, length, levels.scales[:-1], keep_scales=True), levels.scales[1:]
    )


@operator
def step(f_hat, codes, *levels_and_scale) -> tuple[Tensor, Tensor]:
    *levels, scale = levels_and_scale
    levels = _Levels(*levels)
    if levels.widths:
        return grids.step(levels, f_hat, codes, scale)
    batch, length, dim = f_hat.shape
    (group,) = levels.groups(levels.scales[scale : scale + 1], length, levels.memo())
    out, pooled = torch.empty_like(f_hat), f_hat.new_empty(batch, sum(levels.lengths[scale + 1 : scale + 2]), dim)
    last = scale + 1 == len(levels.lengths)
    following = length if last else pooled.shape[1]
    blocks = kernels.step_blocks(dim, length, following)
    with assertions():
        kernels.step_kernel[batch, triton.cdiv(following, blocks["BLOCK_I"])](
            out, None if last else pooled, f_hat, codes.contiguous(), group.table, group.bias, group.layout,
            length, levels.codebooks.shape[1], scale, following, D=dim, TAPS=levels.taps, **blocks, **ASSERTING,
        )  # fmt: skip
    return out, pooled


@operator
def quantize(
    x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, samples, per_scale,
    want_statistics, want_phi_grad,
) -> tuple[Tensor, ...]:  # fmt: skip
    levels = _Levels(codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths)
    batch, length, dim = x.shape
    codes = x.new_empty(batch, levels.tokens, dtype=torch.int64)
    rows = x.new_empty(batch, levels.tokens if want_statistics else max(lengths), dim)
    quantized, residual_sum, squares = torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(batch)
    residuals = x.new_empty(len(lengths), batch, length, dim) if want_phi_grad else None
    # Nothing is remembered: the weights are about to change, and a captured step has to build its tables
    # anew.
    _run_scales(
        levels,
        x,
        mask,
        codes,
        rows,
        Memo(),
        (quantized, residual_sum, residuals, squares),
        per_scale,
        want_statistics,
    )
    numbers = dim * (max(batch * length, 1) if mask is None else mask.sum().clamp(min=1))
    loss = 2 * squares.sum() / numbers / len(lengths)
    if not per_scale:
        seen = x if mask is None else x.masked_fill(~mask[..., None], 0)
        quantized = seen + (quantized - seen)
    statistics = _statistics(levels, codes, rows, samples) if want_statistics else x.new_empty(0)
    phi_grads = x.new_empty(0, dim, dim, levels.taps if phi_weights else 0), x.new_empty(0, dim)
    if want_phi_grad:
        phi_grads = (grad / numbers / -len(lengths) for grad in _phi_grads(levels, codes, residuals))
    return quantized, codes, loss, statistics, residual_sum, *phi_grads


@dataclass(frozen=True)
class _Levels:
    """The operators' flat arguments, and what is derived from them."""

    codebooks: Tensor
    phi_weights: Sequence[Tensor]
    phi_biases: Sequence[Tensor]
    lengths: Sequence[int]
    phi_index: Sequence[int]
    metric: str
    widths: Sequence[int]  # none: sequences

    @property
    def scales(self) -> range:
        return range(len(self.lengths))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def taps(self) -> int:
        return max((weight.shape[-1] for weight in self.phi_weights), default=1)

    @functools.cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Each scale's codebook and phi kernel."""
        phis = self.phi_index if self.phi_weights else [0] * len(self.lengths)
        return [(s if len(self.codebooks) > 1 else 0, phis[s]) for s in self.scales]

    def memo(self) -> Memo:
        return Memo(self.codebooks, *self.phi_weights, *self.phi_biases)

    def groups(self, scales: range, length: int, memo: Memo) -> Iterator[_Group]:
        """Consecutive scales whose tables may exist at once: all of ``scales``, or each alone if they are too
        large."""
        if not scales:
            return
        if not self.phi_weights:
            yield _Group(
                scales, self.codebooks.contiguous(), None, self.layout(length, [e for e, _ in self.pairs])
            )
        elif 4 * len(set(self.pairs)) * self.codebooks[0].numel() * self.taps <= TABLE_LIMIT:
            yield self._group(scales, length, memo)
        else:
            for s in scales:
                yield self._group(range(s, s + 1), length, Memo())

    def _group(self, scales: range, length: int, memo: Memo) -> _Group:
        pairs = tuple(dict.fromkeys(self.pairs[s] for s in scales))
        table, bias = memo(lambda: self._build(pairs), pairs)
        index = [pairs.index(pair) if pair in pairs else 0 for pair in self.pairs]
        return _Group(scales, table, bias, self.layout(length, index))

    def _build(self, pairs: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """`table_kernel`'s tables of these pairs ``[P, K, taps, D]``, and the biases of all phi kernels."""
        books, taps = self.codebooks.contiguous(), self.taps
        _, size, dim = books.shape
        weights, bias = self._fold()
        table = books.new_empty(len(pairs), size, taps, dim)
        grid = _blocks((len(pairs) * taps,), size, dim)
        numbers = upload(pairs, torch.int32, books.device)
        kernels.table_kernel[grid](
            table, books, weights, numbers, size, D=dim, TAPS=taps, **kernels.TABLE
        )
        return table, bias

    @functools.cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """phi as products: weights ``[P, taps, in, out]`` and biases ``[P, out]``."""
        return self.memo()(self._fold, "folded")

    def _fold(self) -> tuple[Tensor, Tensor]:
        weights, biases = fold(self.phi_weights, self.phi_biases)
        return weights.mT.contiguous(), biases

    def layout(self, length: int, tables: Sequence[int]) -> Tensor:
        """The kernels' ``layout`` of this schedule on sequences of ``length`` frames."""
        widths = [weight.shape[-1] for weight in self.phi_weights] or [1]
        offsets = [sum(self.lengths[:s]) for s in self.scales]
        books, phis = zip(*self.pairs, strict=True)
        rows = zip(self.lengths, offsets, books, tables, phis, (widths[k] for k in phis), strict=True)
        wide = 2 * (length + self.taps) * max(self.lengths) > INT32_MAX
        return upload(rows, torch.int64 if wide else torch.int32, self.codebooks.device)


@dataclass(frozen=True)
class _Group:
    scales: range
    table: Tensor
    bias: Tensor | None
    layout: Tensor


def _run_scales(
    levels, x, mask, codes, rows, memo, training=(None,) * 4, per_scale=False, keep_rows=False
) -> None:
    batch, length, dim = x.shape
    books, norms = searched(levels.codebooks, levels.metric, memo)
    mask = None if mask is None else mask.contiguous()
    residual = torch.empty_like(x)
    capability = torch.cuda.get_device_capability()[0] if x.is_cuda else 0
    for group in levels.groups(levels.scales, length, memo):
        kernels.residual_kernel[(batch,)](
            x, mask, residual, rows, codes, books, norms, group.table, group.bias, group.layout, *training,
            length, books.shape[1], codes.shape[1], rows.shape[1], group.scales.start, group.scales.stop,
            D=dim, TAPS=levels.taps, COSINE=levels.metric == "cosine", PER_SCALE=per_scale,
            KEEP_ROWS=keep_rows, **kernels.search_blocks(capability, dim),
        )  # fmt: skip
        x = residual


def _decode(levels, codes, length: int, scales: range, *, keep_scales: bool = False) -> Tensor:
    """The sum of the contributions of ``scales``, whose codes these are; or each partial sum."""
    batch, (_, size, dim), base = codes.shape[0], levels.codebooks.shape, None
    codes = codes.contiguous()
    out = levels.codebooks.new_empty(*([len(scales)] if keep_scales else []), batch, length, dim)
    skip = sum(levels.lengths[: scales.start])
    for group in levels.groups(scales, length, levels.memo()):
        first, last = group.scales.start, group.scales.stop
        with assertions():
            kernels.decode_kernel[_blocks((batch,), length)](
                out, base, codes, group.table, group.bias, group.layout, length, size, codes.shape[1], skip,
                first, last, D=dim, TAPS=levels.taps, KEEP_SCALES=keep_scales, **kernels.row_blocks(dim),
                **ASSERTING,
            )  # fmt: skip
        base = out[last - 1] if keep_scales else out
    return out


def _pool(levels, sequences: Tensor, scales: range) -> Tensor:
    """``sequences[scale, B, T, D]`` pooled to the length of each of ``scales``: ``[B, sum of lengths,
    D]``."""
    _, batch, length, dim = sequences.shape
    lengths = levels.lengths[scales.start : scales.stop]
    out = sequences.new_empty(batch, sum(lengths), dim)
    if lengths:
        layout = levels.layout(length, [0] * len(levels.lengths))
        skip = sum(levels.lengths[: scales.start])
        kernels.pool_kernel[_blocks((batch, len(lengths)), max(lengths))](
            out, sequences, layout, length, out.shape[1], skip, scales.start,
            D=dim, **kernels.row_blocks(dim),
        )  # fmt: skip
    return out


def _statistics(levels, codes: Tensor, rows: Tensor, samples: Tensor | None) -> Tensor:
    """Hits and sums of each code, and the sampled rows, flat, from the downsampled ``rows[B, tokens, D]``."""
    books, size, dim = levels.codebooks.shape
    layout = levels.layout(rows.shape[1], [0] * len(levels.lengths)).long()
    book, length, offset = (
        layout[:, field.value] for field in (kernels.BOOK, kernels.LENGTH, kernels.OFFSET)
    )
    start = torch.repeat_interleave(book * size, length, output_size=levels.tokens)
    code = (codes.clamp(min=0) + start).flatten()  # the rows of tokens without a code are zero
    hits = rows.new_zeros(books * size).index_add_(0, code, (codes >= 0).flatten().to(rows.dtype))
    sums = rows.new_zeros(books * size, dim).index_add_(0, code, rows.flatten(0, 1))
    parts = [hits, sums.flatten()]
    if samples is not None:
        length, offset = length[:books, None], offset[:books, None]
        # An empty batch has no rows to give: then the sums, all zero, stand for them.
        sampled = rows[samples // length, samples % length + offset] if len(rows) else sums
        parts.append(sampled.flatten())
    return torch.cat(parts)


def _phi_grads(levels, codes: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """For each phi kernel the sums of ``residuals[S, B, T, D]`` times its input at each tap, and of them
    alone."""
    scales, batch, length, dim = residuals.shape
    layout = levels.layout(length, [0] * scales)
    weights = residuals.new_empty(scales, dim, dim, levels.taps)
    books = levels.codebooks.contiguous()
    kernels.phi_grad_kernel[_blocks((scales * levels.taps,), dim, dim)](
        weights, residuals, codes, books, layout, batch, length, books.shape[1], levels.tokens,
        D=dim, TAPS=levels.taps, **kernels.PHI_GRAD,
    )  # fmt: skip
    phi, kernel_count = layout[:, kernels.PHI.value], len(levels.phi_weights)
    return (
        weights.new_zeros(kernel_count, *weights.shape[1:]).index_add_(0, phi, weights),
        weights.new_zeros(kernel_count, dim).index_add_(0, phi, residuals.sum((1, 2))),
    )


def _blocks(
    leading: tuple[int, ...], rows: int, columns: int | None = None
) -> Callable[[dict], tuple[int, ...]]:
    """A grid: the leading sizes, then one program per block of rows, and of columns."""

    def grid(meta: dict) -> tuple[int, ...]:
        blocks = (triton.cdiv(rows, meta["BLOCK_M"]),)
        return leading + blocks + (() if columns is None else (triton.cdiv(columns, meta["BLOCK_N"]),))

    return grid
