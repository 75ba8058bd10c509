"""The static cache of keys and values that sampling fills scale by scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ScaleCache:
    """Keys and values of the tokens so far, in memory allocated once.

    Attributes:
        k, v: ``[batch, total, heads, head_dim]``; keys as they enter the product (normalised for cosine attention).
        length: tokens held; known to the host, so that no step waits for the device.
    """

    k: Tensor
    v: Tensor
    length: int = 0

    @classmethod
    def empty(
        cls, batch: int, total: int, heads: int, head_dim: int, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> ScaleCache:  # fmt: skip
        """Room for ``total`` tokens."""
        shape = (batch, total, heads, head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.length = 0
