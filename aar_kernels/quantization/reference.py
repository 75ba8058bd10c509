"""Multi-scale residual quantization in plain PyTorch: the definition that every backend is held to.

Rows are vectors of ``latent`` channels: sequences are ``[batch, T, latent]`` here and in every backend. Where there
are ``widths``, the rows of scale ``s`` are a grid of ``lengths[s] / widths[s]`` by ``widths[s]``, row by row, and T is
that of the last scale. Differentiable by autograd, and in any floating dtype. Sources: arXiv 2408.09027, section 3.1
and algorithm 1; grids: arXiv 2404.02905, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable() -> str | None:
    return None


def unsupported(problem) -> str | None:
    return None


def area_down(rows: Tensor, n: int, mask: Tensor | None = None) -> Tensor:
    """Mean of ``rows[B, T, D]`` over the windows [floor(i T / n), ceil((i + 1) T / n)): ``[B, n, D]``.

    With ``mask[B, T]`` the mean is over True rows alone; a window without any gives zero.
    """
    if mask is None:
        return rows if n == rows.shape[1] else F.adaptive_avg_pool1d(rows.mT, n).mT
    weight = _pooled(mask.to(rows.dtype), n)
    mean = area_down(rows.masked_fill(~mask[..., None], 0), n)
    return mean / weight.where(weight > 0, 1)[..., None]


def _pooled(mask: Tensor, n: int) -> Tensor:
    return area_down(mask[..., None], n)[..., 0]


def down(rows: Tensor, s: int, lengths: Sequence[int], widths: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Means of ``rows[B, T, D]`` for scale ``s``: ``[B, lengths[s], D]``. On a grid they are over both axes."""
    if not widths:
        return area_down(rows, lengths[s], mask)
    if lengths[s] == lengths[-1] and widths[s] == widths[-1]:
        return rows
    return F.adaptive_avg_pool2d(_grid(rows, -1, lengths, widths), (lengths[s] // widths[s], widths[s])).flatten(2).mT


def _grid(rows: Tensor, s: int, lengths: Sequence[int], widths: Sequence[int]) -> Tensor:
    """``rows[B, n, D]`` of scale ``s`` as an image ``[B, D, height, width]``."""
    return rows.mT.unflatten(2, (lengths[s] // widths[s], widths[s]))


def linear_up(rows: Tensor, length: int) -> Tensor:
    """Linear interpolation of ``rows[B, n, D]`` to ``[B, length, D]``, ``align_corners=False``."""
    if rows.shape[1] == length:
        return rows
    return F.interpolate(rows.mT, size=length, mode="linear", align_corners=False).mT


def phi(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """phi(u) = (u + conv1d(u)) / 2 along the sequence of ``rows[B, T, D]``."""
    return 0.5 * rows + 0.5 * F.conv1d(rows.mT, weight, bias, padding=weight.shape[-1] // 2).mT


def grid_action(rows: Tensor, s: int, phi: tuple[Tensor, Tensor] | None, lengths, widths) -> Tensor:
    """phi(up(rows)) on grids: bicubic interpolation of ``rows[B, lengths[s], D]`` to the finest grid
    (``align_corners=False``, a = -0.75 as in PyTorch), and phi(u) = (u + conv2d(u)) / 2, zero-padded."""
    image, size = _grid(rows, s, lengths, widths), (lengths[-1] // widths[-1], widths[-1])
    if image.shape[2:] != size:
        image = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
    if phi is not None:
        image = 0.5 * image + 0.5 * F.conv2d(image, *phi, padding=phi[0].shape[-1] // 2)
    return image.flatten(2).mT


def search(rows: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """``[B, n]`` int64: the nearest row of ``codebook[K, D]`` to each of ``rows[B, n, D]``; the first wins a tie."""
    flat = rows.flatten(0, 1)
    if metric == "cosine":
        flat, codebook = F.normalize(flat, dim=-1), F.normalize(codebook, dim=-1)
    distance = flat.square().sum(1, keepdim=True) - 2 * flat @ codebook.T + codebook.square().sum(1)
    return distance.argmin(dim=1).view(rows.shape[:2])


def contribution(
    codes: Tensor, s: int, length: int, codebooks: Tensor, phi_weights: Sequence[Tensor],
    phi_biases: Sequence[Tensor], phi_index: Sequence[int], lengths: Sequence[int] = (), widths: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """What scale ``s`` adds to the reconstruction: phi(up(E_s[codes])), ``[B, length, D]``. Code -1 is a zero row.

    Rows ``[B, n, D]`` may stand for the codes, here and in whatever else decodes: then they are those of the codebook.
    """
    rows = codes
    if not codes.is_floating_point():
        book = codebooks[s if codebooks.shape[0] > 1 else 0]
        torch._assert_async(((codes >= -1) & (codes < len(book))).all(), f"codes must be in [-1, {len(book)})")
        rows = F.embedding(codes.clamp(min=0), book).masked_fill((codes < 0)[..., None], 0)
    weights = (phi_weights[phi_index[s]], phi_biases[phi_index[s]]) if phi_weights else None
    if widths:
        return grid_action(rows, s, weights, lengths, widths)
    rows = linear_up(rows, length)
    return rows if weights is None else phi(rows, *weights)


def encode(
    x: Tensor, mask: Tensor | None, codebooks: Tensor, phi_weights: Sequence[Tensor], phi_biases: Sequence[Tensor],
    lengths: Sequence[int], phi_index: Sequence[int], metric: str, widths: Sequence[int],
) -> Tensor:  # fmt: skip
    """``x[B, T, D]`` -> codes ``[B, sum(lengths)]`` int64.

    The code is -1, "no code", where ``mask[B, T]`` leaves a token no frame to see, and throughout an item that has a
    NaN or an Inf in it.
    """
    levels = _residuals(x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths)
    return torch.cat([codes for _, (_, codes), _ in levels], dim=1)


def _residuals(x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths) -> Iterator:
    """Per scale: its index, (downsampled rows, codes), (residual before, contribution)."""
    residual = x if mask is None else x.masked_fill(~mask[..., None], 0)
    broken = ~residual.detach().isfinite().flatten(1).all(dim=1)
    for s, n in enumerate(lengths):
        rows = down(residual, s, lengths, widths, mask)
        codes = search(rows.detach(), codebooks[s if codebooks.shape[0] > 1 else 0].detach(), metric)
        codes = codes.masked_fill(broken[:, None], -1)
        if mask is not None:
            codes = codes.masked_fill(_pooled(mask.to(rows.dtype), n) == 0, -1)
        h = contribution(codes, s, x.shape[1], codebooks, phi_weights, phi_biases, phi_index, lengths, widths)
        if mask is not None:
            h = h.masked_fill(~mask[..., None], 0)
        yield s, (rows, codes), (residual, h)
        residual = residual - h.detach()


def decode(
    codes: Tensor, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length: int
) -> Tensor:
    """Codes ``[B, sum(lengths)]`` -> ``[B, length, D]``."""
    parts = codes.split(list(lengths), dim=1)
    arguments = codebooks, phi_weights, phi_biases, phi_index, lengths, widths
    return sum(contribution(part, s, length, *arguments) for s, part in enumerate(parts))


def decode_scales(
    codes: Tensor, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length: int
) -> Tensor:
    """The reconstruction after each scale: ``[S, B, length, D]``."""
    parts = codes.split(list(lengths), dim=1)
    arguments = codebooks, phi_weights, phi_biases, phi_index, lengths, widths
    return torch.stack(list(accumulate(contribution(part, s, length, *arguments) for s, part in enumerate(parts))))


def next_scale_inputs(
    codes: Tensor, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length: int
) -> Tensor:
    """Teacher-forcing inputs: after each scale but the last, the reconstruction pooled to the next scale's length.
    ``[B, sum(lengths[1:]), D]``."""
    scales = decode_scales(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length)
    pooled = [down(f_hat, s, lengths, widths) for s, f_hat in enumerate(scales[:-1], start=1)]
    return torch.cat(pooled, dim=1) if pooled else scales.new_empty(codes.shape[0], 0, scales.shape[-1])


def step(
    f_hat: Tensor, codes: Tensor, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, scale: int
) -> tuple[Tensor, Tensor]:
    """One sampling step: add scale's codes ``[B, lengths[scale]]`` to ``f_hat[B, T, D]`` and pool the sum to the next
    scale's length, ``[B, lengths[scale + 1], D]`` (no rows after the last scale)."""
    arguments = codebooks, phi_weights, phi_biases, phi_index, lengths, widths
    f_hat = f_hat + contribution(codes, scale, f_hat.shape[1], *arguments)
    if scale + 1 == len(lengths):
        return f_hat, f_hat[:, :0]
    return f_hat, down(f_hat, scale + 1, lengths, widths)


def quantize(
    x: Tensor, mask: Tensor | None, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths,
    samples: Tensor | None, per_scale: bool, want_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The training forward: quantized ``[B, T, D]``, codes, commitment loss, and the codebook statistics.

    Each scale adds mse(h, r.detach()) + mse(h.detach(), r) to the loss (mean over scales, True rows and channels). The
    straight-through estimator is added at every scale (``per_scale``, so x receives S times the gradient) or once.

    Statistics, flat, for ``E = codebooks.shape[0]`` codebooks: hits ``[E, K]``, the sums of the rows that hit each code
    ``[E, K, D]``, and, where ``samples[E, K]`` (indices into the rows ``[B * lengths[s]]`` of the scale; of scale 0 if
    the codebook is shared) is given, those rows ``[E, K, D]``. Empty unless asked for. A row without a code counts as
    zero; so does every sample of an empty batch.
    """
    books, size, dim = codebooks.shape
    hits, sums = codebooks.new_zeros(books, size), codebooks.new_zeros(books, size, dim)
    sampled = None if samples is None else torch.empty_like(sums)
    valid = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
    x = x if mask is None else x.masked_fill(~mask[..., None], 0)
    count = valid.sum().clamp(min=1) * dim
    quantized, loss, codes = torch.zeros_like(x), x.new_zeros(()), []
    levels = _residuals(x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths)
    for s, (rows, idx), (residual, h) in levels:
        codes.append(idx)
        square = (h - residual.detach()).square() + (h.detach() - residual).square()
        loss = loss + (square * valid[..., None]).sum() / count / len(lengths)
        quantized = quantized + (residual + (h - residual).detach() if per_scale else h)
        if want_statistics:
            e = s if books > 1 else 0
            hit, seen = idx.flatten(), idx.flatten() >= 0
            flat = rows.detach().flatten(0, 1).masked_fill(~seen[:, None], 0)
            hits[e].index_add_(0, hit.clamp(min=0), seen.to(x.dtype))
            sums[e].index_add_(0, hit.clamp(min=0), flat)
            if sampled is not None and (books > 1 or s == 0):
                sampled[e] = flat.index_select(0, samples[e]) if len(flat) else 0
    if not per_scale:
        quantized = x + (quantized - x).detach()
    parts = [] if not want_statistics else [hits, sums] if sampled is None else [hits, sums, sampled]
    statistics = torch.cat([part.flatten() for part in parts]) if parts else x.new_empty(0)
    return quantized, torch.cat(codes, dim=1), loss, statistics


def update(
    codebooks: Tensor, cluster_size: Tensor, embed_avg: Tensor, statistics: Tensor, decay: float, epsilon: float,
    dead_code_threshold: float,
) -> None:  # fmt: skip
    """Move the averages towards the statistics of `quantize`, and the codebooks to the averages, in place.

    With samples among the statistics, codes whose average hits are below the threshold are replaced by theirs.
    Source: VQ-VAE, arXiv 1711.00937, appendix A.1, with Laplace smoothing.
    """
    books, size, dim = codebooks.shape
    hits, *rows = statistics.split([books * size, statistics.numel() - books * size])
    sums, *sampled = rows[0].split(books * size * dim)
    cluster_size.mul_(decay).add_(hits.view(books, size), alpha=1 - decay)
    embed_avg.mul_(decay).add_(sums.view(books, size, dim), alpha=1 - decay)
    if sampled:
        rows = sampled[0].view(books, size, dim)
        # A zero row is no offer: its sample was padding, or an item that has a NaN in it.
        dead = (cluster_size < dead_code_threshold) & (rows != 0).any(dim=-1)
        # The averages are replaced too: left alone they would overwrite the new row in the lines below.
        embed_avg.copy_(torch.where(dead[..., None], rows * dead_code_threshold, embed_avg))
        cluster_size.masked_fill_(dead, dead_code_threshold)
    total = cluster_size.sum(dim=1, keepdim=True)
    smoothed = (cluster_size + epsilon) / (total + size * epsilon) * total
    torch.div(embed_avg, smoothed[..., None], out=codebooks)


def encode_projected(
    x: Tensor, codebooks: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor,
    strides: Sequence[int], metric: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``x[B, channels, T]`` -> codes ``[B, sum(T / strides)]``, and what each level projected ``[B, S * dim, T]``.

    Codes are -1 throughout an item that has a NaN or an Inf in it.
    """
    residual, codes, projected = x, [], []
    broken = ~x.isfinite().flatten(1).all(dim=1)
    for s, stride in enumerate(strides):
        z = F.conv1d(residual, weight_in[s][:, :, None], bias_in[s])
        found = search(area_down(z.mT, x.shape[2] // stride), codebooks[s], metric).masked_fill(broken[:, None], -1)
        residual = residual - _projected_out(found, s, codebooks, weight_out, bias_out, stride)
        codes.append(found)
        projected.append(z)
    return torch.cat(codes, dim=1), torch.cat(projected, dim=1)


def decode_projected(
    codes: Tensor, codebooks: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor,
    strides: Sequence[int], metric: str, length: int,
) -> Tensor:  # fmt: skip
    """Codes ``[B, sum(length / strides)]`` -> ``[B, channels, length]``."""
    parts = codes.split([length // stride for stride in strides], dim=1)
    levels = enumerate(zip(parts, strides, strict=True))
    return sum(_projected_out(part, s, codebooks, weight_out, bias_out, stride) for s, (part, stride) in levels)


def _projected_out(codes: Tensor, s: int, codebooks: Tensor, weight_out: Tensor, bias_out: Tensor, stride: int):
    rows = contribution(codes, s, codes.shape[1], codebooks, (), (), ())
    return F.conv1d(rows.mT, weight_out[s][:, :, None], bias_out[s]).repeat_interleave(stride, dim=-1)
