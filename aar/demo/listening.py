"""Sounds, pictures and distances of recordings as a SAT reconstructs them from more and more scales."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

from ..audio import write_audio
from ..models import SAT
from ..training.losses import MultiResolutionMelLoss
from . import page
from .picture import SpectrogramPainter
from .recordings import Recording

SCALES = (1, 5, 9, 13, 16)
OVERLAP = 0.05
"""Seconds over which windows are cross-faded, so that no seam is heard."""


class Listening:
    """Writes `sounds` and `pictures` below a directory, and remembers how far each is from its source."""

    def __init__(self, sat: SAT, directory: Path):
        self.sat, self.directory = sat, directory
        self.rate = sat.config.sample_rate
        self.distance = MultiResolutionMelLoss(self.rate)
        self.painter = SpectrogramPainter(self.rate)
        self.distances: dict[str, list[list[float]]] = {}
        for folder in ("sounds", "pictures"):
            (directory / folder).mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def show(self, recording: Recording) -> page.Clip:
        """Reconstructs a recording and writes all versions of it."""
        source = recording.wave
        waves = self.sat.reconstruct_scales(source[None, None], SCALES, overlap=OVERLAP)[:, 0, 0]
        distances = [self.distance(wave, source).item() for wave in waves]
        self.distances.setdefault(recording.kind, []).append(distances)

        stems = [f"{recording.stem}_scale{scale:02d}" for scale in SCALES]
        titles = [f"{scale} scale{'s' if scale > 1 else ''}" for scale in SCALES]
        remarks = [f"distance {distance:.1f}" for distance in distances]
        versions = zip(
            (f"{recording.stem}_source", *stems),
            ("source", *titles),
            (f"{len(source) / self.rate:.1f} s", *remarks),
            (source, *waves),
            strict=True,
        )
        loudest = self.painter.loudest(source)
        shown = []
        for stem, title, remark, wave in versions:
            version = page.Version(title, remark, f"sounds/{stem}.wav", f"pictures/{stem}.png")
            write_audio(self.directory / version.sound, wave, self.rate)
            self.painter.paint(self.directory / version.picture, wave, loudest)
            shown.append(version)
        return page.Clip(recording.name, recording.kind, shown)

    def table(self) -> page.Table:
        """Tokens, bits and mean distance by kind, for each number of scales, of all that was shown."""
        config = self.sat.config
        windows_per_second = self.rate / self.sat.windows(OVERLAP).hop
        bits = (config.codebook_size - 1).bit_length()
        tokens = list(accumulate(config.lengths))
        means = [_mean_columns(rows) for rows in self.distances.values()]
        overall = _mean_columns([row for rows in self.distances.values() for row in rows])
        rows = []
        for i, scale in enumerate(SCALES):
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
