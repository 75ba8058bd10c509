"""How many of a tokenizer's codes its training uses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import aar_kernels as ak

__all__ = ["CodebookUsage"]


class CodebookUsage(nn.Module):
    """Part of all codes that were used during the last `span` batches, by any process."""

    def __init__(self, schedule: ak.ScaleSchedule, codebook_size: int, span: int = 50):
        super().__init__()
        self.span, self.batches = span, 0
        self.register_buffer("offsets", schedule.scale_of_token() * codebook_size, persistent=False)
        last = torch.full((schedule.num_scales * codebook_size,), -span)
        self.register_buffer("last_batch", last, persistent=False)

    def update(self, codes: Tensor) -> None:
        """Counts codes [B, total] of one batch."""
        self.batches += 1
        self.last_batch[(codes + self.offsets).flatten()] = self.batches

    def part(self) -> float:
        """0 to 1; every process must ask."""
        last = self.last_batch
        if dist.is_available() and dist.is_initialized():
            last = last.clone()
            dist.all_reduce(last, dist.ReduceOp.MAX)
        return (last > self.batches - self.span).float().mean().item()
