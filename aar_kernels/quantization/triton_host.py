"""What the host sides of the Triton kernels share: how they launch, and what they remember of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import DerivedCache
from ..graph import captured_elsewhere, keep

T = TypeVar("T")
_derived: DerivedCache[dict] = DerivedCache()


def operator(function: Callable[..., T]) -> Callable[..., T]:
    """Launch on the device of the first tensor, and record nothing for autograd (`ops` registers the gradients)."""

    @functools.wraps(function)
    def run(first: Tensor, *args) -> T:
        with torch.no_grad(), torch.cuda.device_of(first):
            return function(first.contiguous(), *args)

    return run


class Memo:
    """Values derived from weights, until one of those changes. One for each CUDA stream: another stream would have to
    wait for the one that builds.

    Under a capture that does not `keep` it nothing is remembered: that graph would otherwise go on reading memory that
    the cache gives up when a weight changes. Nor is anything of no weights.
    """

    def __init__(self, *weights: Tensor):
        cuda = bool(weights) and weights[0].is_cuda
        self._stream = torch.cuda.current_stream() if cuda else None
        self._values = {} if not weights or (cuda and captured_elsewhere()) else keep(_derived.get(weights, dict))

    def __call__(self, build: Callable[[], T], *key) -> T:
        key = self._stream, *key
        if key not in self._values:
            self._values[key] = build()
        return self._values[key]


def searched(codebooks: Tensor, metric: str, memo: Memo) -> tuple[Tensor, Tensor]:
    """The codebooks as the search sees them, and the squared norms of their rows."""
    books = codebooks.contiguous()
    if metric == "cosine":
        books = memo(lambda: F.normalize(books, dim=-1), "unit codebooks")
    return books, memo(lambda: books.square().sum(-1), "norms", metric)


@functools.lru_cache(maxsize=256)
def _uploaded(rows: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=device)


def upload(rows: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few integers on the device. Copied there once, so that later calls neither copy nor wait."""
    return keep(_uploaded(tuple(rows), dtype, device))
