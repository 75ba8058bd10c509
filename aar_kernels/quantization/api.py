"""Public functions of multi-scale residual quantization: they check their input, then pick a backend.

Sequences are ``[batch, latent, T]``, codes ``[batch, schedule.total]`` int64 with the scales in order, coarse to fine.
``T`` need not be the schedule's length: then every scale pools and interpolates. With a `GridSchedule`, images
``[batch, latent, height, width]`` of its finest scale stand for sequences; they have no mask, and `quantize`, whose
codebooks are moving averages, does not take them. bf16 and fp16 sequences are searched in fp32. Code -1 means "no code"
and stands for a zero row: encode gives it to tokens that a mask leaves without a frame, and to every token of an item
with a NaN or an Inf.

The functions that decode take rows ``[batch, total, latent]`` in place of codes too: mixtures of codes, as in VAR's
smooth sampling, or what else may stand for them.

Raises, on every backend alike:
    ValueError: shapes, dtypes or devices that do not fit.
    RuntimeError: codes outside ``[-1, codebook_size)`` (under CUDA a device-side assertion, as in PyTorch's indexing).
    BackendError: a forced backend that cannot run the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from . import ops, reference
from .levels import Levels, ProjectedLevels


def encode(x: Tensor, levels: Levels, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Codes of ``x[B, latent, T]`` (algorithm 1): ``[B, total]`` int64. Not differentiable.

    Args:
        mask: ``[B, T]`` bool, True at real frames of a padded batch; pooling, and so every code, sees those alone.
    """
    rows = _rows(x, levels, mask).detach()
    return _run("encode", backend, (rows, mask), levels)


def decode(codes: Tensor, levels: Levels, *, length: int | None = None, backend: str | None = None) -> Tensor:
    """Sum of all scales' contributions: ``[B, latent, length]``, ``length`` being the schedule's unless given.

    Differentiable by codebooks and phi (the reference runs where gradients are asked for).
    """
    rows = _run("decode", backend, (_codes(codes, levels),), levels, _length(length, levels))
    return _channels_first(rows, levels)


def decode_scales(codes: Tensor, levels: Levels, *, length: int | None = None, backend: str | None = None) -> Tensor:
    """The reconstruction after each scale: ``[S, B, latent, length]``. Differentiable as `decode`."""
    rows = _run("decode_scales", backend, (_codes(codes, levels),), levels, _length(length, levels))
    return _channels_first(rows, levels)


def next_scale_inputs(
    codes: Tensor, levels: Levels, *, length: int | None = None, backend: str | None = None
) -> Tensor:
    """Teacher-forcing inputs of a next-scale model (section 3.2): the reconstruction after each scale but the last,
    pooled to the length of the next: ``[B, total - lengths[0], latent]``."""
    return _run("next_scale_inputs", backend, (_codes(codes, levels),), levels, _length(length, levels))


def step(
    scale: int, f_hat: Tensor, codes: Tensor, levels: Levels, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One step of next-scale sampling; equals `next_scale_inputs` taken one scale at a time.

    Args:
        scale: index of the scale that ``codes[B, lengths[scale]]``, or rows, belong to.
        f_hat: ``[B, T, latent]``, the reconstruction before this scale; zeros for scale 0. Of an image the rows are its
            cells, row by row: ``image.flatten(2).mT``.

    Returns:
        The reconstruction after it, ``[B, T, latent]``, and the next scale's input, ``[B, lengths[scale + 1], latent]``
        (no rows after the last scale).
    """
    lengths = levels.schedule.lengths
    if not 0 <= scale < len(lengths):
        raise ValueError(f"scale {scale} is outside 0..{len(lengths) - 1}")
    codes = _codes(codes, levels, lengths[scale])
    batch, latent = codes.shape[0], levels.latent_dim
    if f_hat.dim() != 3 or f_hat.shape[0] != batch or f_hat.shape[1] == 0 or f_hat.shape[2] != latent:
        raise ValueError(f"f_hat must be [{batch}, T >= 1, {latent}], got {list(f_hat.shape)}")
    if levels.of_grids and f_hat.shape[1] != levels.schedule.length:
        raise ValueError(f"f_hat must have the finest grid's {levels.schedule.length} rows, got {f_hat.shape[1]}")
    return _run("step", backend, (f_hat.to(levels.codebooks.dtype), codes), levels, scale)


def quantize(
    x: Tensor, levels: Levels, *, mask: Tensor | None = None, straight_through: str = "per_scale",
    statistics: bool = False, samples: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The training forward. Gradients reach ``x`` (straight-through and commitment) and phi (the loss).

    Args:
        x: ``[B, latent, T]``.
        mask: ``[B, T]`` bool, True at real frames; the others count neither in the loss nor in the statistics.
        straight_through: ``"per_scale"`` adds an estimator at every scale, so that ``x`` receives the gradient of
            ``quantized`` S times over, as the published models were trained; ``"once"`` passes it through once (VAR).
        statistics: also return what the codebook update needs, see `reference.quantize`.
        samples: ``[codebooks, K]`` int64, rows to return with the statistics, as replacements for dead codes.

    Returns:
        quantized ``[B, latent, T]``, codes ``[B, total]``, the commitment loss (scalar), statistics (flat).
    """
    if straight_through not in ("per_scale", "once"):
        raise ValueError(f'straight_through must be "per_scale" or "once", got {straight_through!r}')
    if levels.of_grids:
        raise ValueError("quantize is for sequences; a quantizer of grids is trained by its own package")
    if levels.codebooks.shape[0] not in (1, levels.schedule.num_scales):
        raise ValueError("training needs a level for each of the codebooks")
    rows, per_scale = _rows(x, levels, mask), straight_through == "per_scale"
    if samples is not None and (samples.shape != levels.codebooks.shape[:2] or samples.dtype != torch.int64):
        shape = list(levels.codebooks.shape[:2])
        raise ValueError(f"samples must be int64 {shape}, got {samples.dtype} {list(samples.shape)}")
    arguments = (rows, mask, *levels.arguments(), samples, per_scale, statistics)
    name = dispatch.select("msrq_quantize", rows, mask, levels.codebooks, samples, backend=backend)
    if name == "reference":
        quantized, codes, loss, numbers = reference.quantize(*arguments)
    else:
        phi_grad = torch.is_grad_enabled() and any(weight.requires_grad for weight in levels.weights[1:])
        quantized, codes, loss, numbers, *_ = ops.call("quantize", *arguments, phi_grad, name)
    return quantized.mT.to(x.dtype), codes, loss, numbers


@torch.no_grad()
def update(
    codebooks: Tensor, cluster_size: Tensor, embed_avg: Tensor, statistics: Tensor, *, decay: float = 0.99,
    epsilon: float = 1e-5, dead_code_threshold: float = 0.0, backend: str | None = None,
) -> None:  # fmt: skip
    """Update moving-average codebooks in place from the statistics of `quantize` (VQ-VAE, appendix A.1).

    Args:
        codebooks, embed_avg: ``[E, K, latent]``; embed_avg is the average of the sums of the rows that hit each code.
        cluster_size: ``[E, K]``, the average number of hits.
        statistics: as `quantize` returned them, summed over processes. With samples among them, codes whose average
            hits are below ``dead_code_threshold`` are replaced by theirs.
    """
    averages = {"codebooks": codebooks, "cluster_size": cluster_size, "embed_avg": embed_avg, "statistics": statistics}
    if codebooks.dim() != 3 or embed_avg.shape != codebooks.shape or cluster_size.shape != codebooks.shape[:2]:
        shapes = {name: list(tensor.shape) for name, tensor in averages.items()}
        raise ValueError(f"codebooks and embed_avg must be [E, K, latent] and cluster_size [E, K], got {shapes}")
    if any(not tensor.is_contiguous() or tensor.dtype != codebooks.dtype for tensor in averages.values()):
        raise ValueError("codebooks, averages and statistics must be contiguous and of one dtype")
    hits, sums = cluster_size.numel(), codebooks.numel()
    if statistics.shape not in ((hits + sums,), (hits + 2 * sums,)):
        raise ValueError(f"statistics must be [{hits + sums}] or [{hits + 2 * sums}], got {list(statistics.shape)}")
    arguments = (codebooks, cluster_size, embed_avg, statistics, decay, epsilon, dead_code_threshold)
    name = dispatch.select("msrq_update", *arguments[:4], backend=backend)
    if name == "reference":
        reference.update(*arguments)
    else:
        ops.call("update", *arguments, name)


@torch.no_grad()
def encode_projected(x: Tensor, levels: ProjectedLevels, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Codes of ``x[B, channels, T]`` by a factorised quantizer. Not differentiable.

    Returns:
        codes ``[B, sum(T / strides)]`` int64, level after level, and what each level projected the residual to, before
        averaging: ``[B, levels * dim, T]``.
    """
    weights = levels.arguments()
    if x.dim() != 3 or x.shape[1] != levels.channels or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point [batch, {levels.channels}, T], got {x.dtype} {list(x.shape)}")
    levels.lengths(x.shape[2])
    x = x.to(levels.codebooks.dtype)
    chosen = dispatch.select("msrq_encode_projected", x, levels.codebooks, backend=backend)
    return _call("encode_projected", chosen, (x, *weights))


def decode_projected(codes: Tensor, levels: ProjectedLevels, *, length: int, backend: str | None = None) -> Tensor:
    """Sum of the levels' contributions, ``[B, channels, length]``. Differentiable by codebooks and projections."""
    arguments = (codes, *levels.arguments(), length)
    _check_codes(codes, sum(levels.lengths(length)))
    grad = torch.is_grad_enabled() and any(weight.requires_grad for weight in levels.weights)
    chosen = dispatch.select("msrq_decode_projected", levels.codebooks, codes, backend=backend, needs_grad=grad)
    return _call("decode_projected", chosen, arguments)


def _call(name: str, backend: str, arguments: tuple):
    return getattr(reference, name)(*arguments) if backend == "reference" else ops.call(name, *arguments, backend)


def _run(name: str, backend: str | None, tensors: tuple, levels: Levels, *extra: int):
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*levels.weights, *tensors))
    grad = grad and name != "encode"
    rows = name != "encode" and tensors[-1].is_floating_point()
    needs = ("grids",) * levels.of_grids + ("rows in place of codes",) * rows
    arguments = (*tensors, *levels.arguments(), *extra)
    chosen = dispatch.select(
        f"msrq_{name}", levels.codebooks, *tensors, backend=backend, needs_grad=grad, dim=levels.latent_dim,
        needs=needs,
    )  # fmt: skip
    return _call(name, chosen, arguments)


def _rows(x: Tensor, levels: Levels, mask: Tensor | None) -> Tensor:
    if levels.of_grids:
        if x.shape[1:] != (levels.latent_dim, *levels.schedule.grid):
            wanted = [levels.latent_dim, *levels.schedule.grid]
            raise ValueError(f"x must be [batch, {', '.join(map(str, wanted))}], got {list(x.shape)}")
        if mask is not None:
            raise ValueError("a mask is for sequences, not for grids")
        x = x.flatten(2)
    if x.dim() != 3 or x.shape[1] != levels.latent_dim or x.shape[2] == 0:
        raise ValueError(f"x must be [batch, {levels.latent_dim}, T >= 1], got {list(x.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (x.shape[0], x.shape[2])):
        shape = [x.shape[0], x.shape[2]]
        raise ValueError(f"mask must be bool {shape}, got {mask.dtype} {list(mask.shape)}")
    return x.mT.to(levels.codebooks.dtype).contiguous()


def _channels_first(rows: Tensor, levels: Levels) -> Tensor:
    return rows.mT.unflatten(-1, levels.schedule.grid) if levels.of_grids else rows.mT


def _length(length: int | None, levels: Levels) -> int:
    if length is None:
        return levels.schedule.length
    if levels.of_grids:
        raise ValueError("a length is for sequences; a grid is decoded to its finest scale")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return length


def _codes(codes: Tensor, levels: Levels, tokens: int | None = None) -> Tensor:
    """Of all scales, unless ``tokens`` says of how many; or rows in their place."""
    tokens = levels.schedule.total if tokens is None else tokens
    if codes.is_floating_point() and codes.dim() == 3:
        if codes.shape[1:] != (tokens, levels.latent_dim):
            raise ValueError(f"rows must be [batch, {tokens}, {levels.latent_dim}], got {list(codes.shape)}")
        return codes.to(levels.codebooks.dtype)
    _check_codes(codes, tokens)
    return codes


def _check_codes(codes: Tensor, tokens: int) -> None:
    if codes.dim() != 2 or codes.shape[1] != tokens or codes.dtype != torch.int64:
        raise ValueError(f"codes must be int64 [batch, {tokens}], got {codes.dtype} {list(codes.shape)}")
