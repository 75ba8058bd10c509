"""Training: the search in one codebook, inside a quantizer whose forward pass stays the package's own.

Losses, straight-through estimates, moving averages, draws for dead codes and what processes tell each other are then
the package's, in its order. What goes is the matrix of all distances, and where codes were counted by a product with
one-hot rows, those rows too.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor

from .. import quantization
from ..quantization import Levels
from ..schedule import ScaleSchedule
from .adapter import Adapter, traced


class Search(Adapter):
    """A codebook, or the level that searches in one."""

    def _check(self) -> str:
        return "search"

    @property
    def _package(self) -> ModuleType:
        """The module of the original class, for its functions."""
        return sys.modules[self._aar_original.__module__]

    @torch.compiler.disable
    def _nearest(self, x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor | None:
        """The code nearest to each of ``x[B, D, T]`` in ``codebook[K, D]``: ``[B, T]``; None where the original must
        run."""
        if traced() or 0 in x.shape or (backend := self._choose("msrq_encode", codebook, x)) is None:
            return None
        # A view of its own at each call, for packages write codebooks where no version counter sees it.
        levels = Levels(ScaleSchedule((x.shape[2],)), codebook.detach()[None], metric=metric)
        codes = quantization.encode(x, levels, backend=backend)
        return None if int(codes.amin()) < 0 else codes  # a NaN or an Inf, for which each package has its own answer


def totals(rows: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How often each of ``size`` codes was chosen ``[size]``, and the sum of its rows ``[size, D]``, of ``rows[N, D]``
    and ``codes[N]``."""
    hits = torch.bincount(codes, minlength=size).to(rows.dtype)
    return hits, rows.new_zeros(size, rows.shape[1]).index_add_(0, codes, rows)
