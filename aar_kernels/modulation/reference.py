"""Adaptive layer normalisation in plain PyTorch: the definition that every backend is held to.

Differentiable by autograd. Source: DiT, arXiv 2212.09748, section 3.2 (adaLN-Zero); AAR, arXiv 2408.09027.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable() -> str | None:
    return None


def unsupported(problem) -> str | None:
    return None


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``x + gate * y`` (or ``x`` where there is no ``y``), and ``LayerNorm`` of that ``* (1 + scale) + shift``.

    ``x, y[B, L, C]``; ``gate, scale, shift[B, C]``. All arithmetic is in fp32 (fp64 where x is). The first result has
    x's dtype, and is normalised as it was rounded to it; the second has ``dtype``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if y is not None:
        x = (x.to(wide) + gate[:, None].to(wide) * y.to(wide)).to(x.dtype)
    normal = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return x, (normal * (1 + scale[:, None].to(wide)) + shift[:, None].to(wide)).to(dtype)
