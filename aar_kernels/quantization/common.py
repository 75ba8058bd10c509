"""What the fast backends share: how codes act on the sequence, as rows of a table (design: see `fold`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fold(phi_weights: Sequence[Tensor], phi_biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """phi(u) = (u + conv(u)) / 2 as one convolution: weights ``[P, taps, out, in]`` and biases ``[P, out]``.

    Kernels narrower than the widest are padded with zero taps; the taps of square ones stand row by row. Since phi and
    the interpolation are linear, a code E acts on the sequence through its ``taps`` rows ``folded[tap] @ E`` alone: no
    convolution is left to do.
    """
    width, axes = max(weight.shape[-1] for weight in phi_weights), phi_weights[0].dim() - 2
    dim = phi_weights[0].shape[0]
    folded = phi_weights[0].new_zeros(len(phi_weights), *[width] * axes, dim, dim)
    for out, weight in zip(folded, phi_weights, strict=True):
        margin = (width - weight.shape[-1]) // 2
        out[(slice(margin, width - margin),) * axes] = 0.5 * weight.movedim((0, 1), (-2, -1))
    folded = folded.flatten(1, axes)
    folded[:, folded.shape[1] // 2] += 0.5 * torch.eye(dim, dtype=folded.dtype, device=folded.device)
    return folded, 0.5 * torch.stack(list(phi_biases))


def later_rows(codebooks: Tensor, weight_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> Tensor:
    """What each code of a factorised quantizer takes from what later levels will project: ``[S, K, S * dim]``.

    Level ``j`` projects a residual from which level ``s`` took ``weight_out[s] @ e + bias_out[s]``, so it sees
    ``weight_in[j] @ (weight_out[s] @ e + bias_out[s])`` less. Zero for the levels up to ``s``.
    """
    levels, _, dim = codebooks.shape
    into = weight_in.double().flatten(0, 1)
    rows = codebooks.double() @ (into @ weight_out.double()).mT + (bias_out.double() @ into.mT)[:, None]
    later = torch.arange(levels * dim, device=rows.device) // dim > torch.arange(levels, device=rows.device)[:, None]
    return (rows * later[:, None]).to(codebooks.dtype)
