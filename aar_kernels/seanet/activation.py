"""What layers apply to their input, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .layers import ELU, SNAKE


def activate(x: Tensor, activation: int, alpha: Tensor | None) -> Tensor:
    """``x[B, C, T]``; ``alpha[C]`` of Snake (arXiv 2006.08195, with DAC's guard against division by zero)."""
    if activation == SNAKE:
        alpha = alpha[:, None]
        return x + (alpha + 1e-9).reciprocal() * (alpha * x).sin().square()
    return F.elu(x) if activation == ELU else x
