"""Recordings of any length, cut into windows of one length and joined again."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

__all__ = ["Windows"]


@dataclass(frozen=True)
class Windows:
    """Windows of `size` samples of which neighbours share `overlap` samples. Window w starts at w * hop.

    The last window is filled with zeros. Where two windows overlap their gains are linear and sum to one
    (equal gain, not equal power: both windows hold the same signal, so their sum is coherent).

    Raises:
        ValueError: the overlap is negative or above half a window, where three windows would meet.
    """

    size: int
    overlap: int = 0

    def __post_init__(self):
        if not 0 <= self.overlap <= self.size // 2:
            raise ValueError(
                f"overlap must be 0 to {self.size // 2} samples (half a window), got {self.overlap}"
            )

    @property
    def hop(self) -> int:
        return self.size - self.overlap

    def count(self, num_samples: int) -> int:
        """How many windows cover `num_samples` samples: at least one."""
        return 1 + max(0, -(-(num_samples - self.size) // self.hop))

    def span(self, count: int) -> int:
        """How many samples `count` windows cover."""
        return (count - 1) * self.hop + self.size

    def split(self, wav: torch.Tensor) -> torch.Tensor:
        """[B, N] -> [B, windows, size]."""
        missing = self.span(self.count(wav.shape[-1])) - wav.shape[-1]
        return F.pad(wav, (0, missing)).unfold(-1, self.size, self.hop)

    def add(self, out: torch.Tensor, window: torch.Tensor, index: int) -> None:
        """Adds a window [..., size], faded towards its neighbours, to out [..., span(count)] at its place."""
        start = index * self.hop
        end = start + self.size
        gain = window.new_ones(self.size)
        if self.overlap:
            ramp = (torch.arange(self.overlap, dtype=window.dtype, device=window.device) + 0.5) / self.overlap
            if start > 0:
                gain[: self.overlap] = ramp
            if end < out.shape[-1]:
                gain[-self.overlap :] = 1 - ramp
        out[..., start:end] += gain * window
