"""Recordings as a SAT reconstructs them from more and more scales, and how far each is from its source."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from ..models import SAT
from ..training.losses import MultiResolutionMelLoss
from . import page
from .gallery import Gallery
from .recordings import Recording

SCALES = (1, 5, 9, 13, 16)
OVERLAP = 0.05
"""Seconds over which windows are cross-faded, so that no seam is heard."""


class Listening:
    """Shows reconstructions in a gallery, and remembers how far each is from its source."""

    def __init__(self, sat: SAT, gallery: Gallery):
        self.sat, self.gallery = sat, gallery
        self.scales = tuple(scale for scale in SCALES if scale < sat.num_scales) + (sat.num_scales,)
        self.distance = MultiResolutionMelLoss(sat.config.sample_rate)
        self.distances: dict[str, list[list[float]]] = {}

    @torch.no_grad()
    def show(self, recording: Recording) -> page.Clip:
        """The source, then its reconstructions from coarse to fine."""
        source, stem, add = recording.wave, recording.stem, self.gallery.add
        waves = self.sat.reconstruct_scales(source[None, None], self.scales, overlap=OVERLAP)[:, 0, 0]
        distances = [self.distance(wave, source).item() for wave in waves]
        self.distances.setdefault(recording.kind, []).append(distances)
        shown = [add(f"{stem}_source", source, "source", f"{len(source) / self.sat.config.sample_rate:.1f} s")]
        for scale, wave, distance in zip(self.scales, waves, distances, strict=True):
            title = f"{scale} scale{'s' if scale > 1 else ''}"
            shown.append(add(f"{stem}_scale{scale:02d}", wave, title, f"distance {distance:.1f}", like=source))
        return page.Clip(recording.name, recording.kind, shown)

    def table(self) -> page.Table:
        """Tokens, bits and mean distance by kind, for each number of scales, of all that was shown."""
        config = self.sat.config
        windows_per_second = config.sample_rate / self.sat.windows(OVERLAP).hop
        bits = (config.codebook_size - 1).bit_length()
        tokens = list(accumulate(config.lengths))
        means = [_mean_columns(rows) for rows in self.distances.values()]
        overall = _mean_columns([row for rows in self.distances.values() for row in rows])
        rows = []
        for i, scale in enumerate(self.scales):
            per_second = tokens[scale - 1] * windows_per_second
            distances = [f"{column[i]:.2f}" for column in (*means, overall)]
            rows.append([str(scale), f"{per_second:.0f}", f"{per_second * bits / 1000:.2f}", *distances])
        return page.Table(
            f"Mel distance to the source, less is nearer; rates with the {OVERLAP:g} s that windows overlap",
            ["scales", "tokens/s", "kbit/s", *self.distances, "all"],
            rows,
        )


def _mean_columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
