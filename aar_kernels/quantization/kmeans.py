"""k-means in constant extra memory: assignment by the encode operator, means by index_add."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import ScaleSchedule
from . import api
from .levels import Levels


def nearest(rows: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """``[N]`` int64: index of the row of ``codebook[K, D]`` nearest to each of ``rows[N, D]``."""
    levels = Levels(ScaleSchedule((1,)), codebook[None], metric=metric)
    return api.encode(rows[:, :, None], levels)[:, 0]


def kmeans(
    rows: Tensor, num_clusters: int, iterations: int, metric: str = "euclidean", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from randomly drawn rows.

    Args:
        rows: ``[N, D]``, N >= 1. With fewer rows than clusters they are drawn with repetition.
        seed: of the draw; a generator of its own, so that all processes draw alike.

    Returns:
        means ``[num_clusters, D]`` and the number of rows that each one is the mean of, ``[num_clusters]``. A cluster
        that loses all its rows keeps its last mean.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(rows)
    if count >= num_clusters:
        chosen = torch.randperm(count, generator=generator)[:num_clusters]
    else:
        chosen = torch.randint(count, (num_clusters,), generator=generator)
    means = rows[chosen.to(rows.device)]
    hits = rows.new_zeros(num_clusters)
    ones = rows.new_ones(count)
    for _ in range(iterations):
        codes = nearest(rows, means, metric)
        hits = torch.zeros_like(hits).index_add_(0, codes, ones)
        sums = torch.zeros_like(means).index_add_(0, codes, rows)
        means = torch.where((hits > 0)[:, None], sums / hits.clamp(min=1)[:, None], means)
    return means, hits
