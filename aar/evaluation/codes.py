"""How codebooks are used, and how well a transformer predicts codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

import aar_kernels as ak

from ..models import AAR

__all__ = ["CodeCounts", "token_nll"]


class CodeCounts:
    """Counts how often each scale uses each code."""

    def __init__(self, schedule: ak.ScaleSchedule, codebook_size: int):
        self.scale_of_token = schedule.scale_of_token()
        self.counts = torch.zeros(schedule.num_scales, codebook_size, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        """Adds codes ``[B, total]``, each below `codebook_size`."""
        places = self.scale_of_token * self.counts.shape[1] + codes.cpu()
        self.counts += torch.bincount(places.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    @property
    def used(self) -> Tensor:
        """Part of the codes that were used at all: ``[scales]``."""
        return (self.counts > 0).double().mean(dim=1)

    @property
    def entropy(self) -> Tensor:
        """Bits per token if each were drawn by how often it was used: ``[scales]``; log2 of the codebook size at best.

        Never above log2 of the tokens counted, either: few recordings cannot show a full codebook.
        """
        part = self.counts / self.counts.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.special.entr(part.double()).sum(dim=1) / math.log(2)


@torch.no_grad()
def token_nll(model: AAR, condition: Tensor | None, codes: Tensor) -> Tensor:
    """Cross entropy of every code, in nats: ``[B, total]`` for codes ``[B, total]``."""
    logits = model(condition, codes)
    return F.cross_entropy(logits.mT, codes, reduction="none")
