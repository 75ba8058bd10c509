"""New sounds from an AAR: like a recording, window by window, or like nothing in particular."""

from __future__ import annotations

import torch
from torch import Tensor

from ..conditions import AcousticEmbedding
from ..models import AAR, SAT
from . import page
from .gallery import Gallery
from .listening import OVERLAP
from .recordings import Recording

TAKES = 3
UNCONDITIONAL = 12


class Making:
    """Shows new sounds in a gallery. The same seed makes the same ones."""

    def __init__(self, sat: SAT, aar: AAR, gallery: Gallery, seed: int = 0):
        self.sat, self.aar, self.gallery, self.seed = sat, aar, gallery, seed
        self.embedding = AcousticEmbedding(sat.config.sample_rate)

    @torch.no_grad()
    def conditions(self, wave: Tensor) -> Tensor:
        """The acoustic embedding of each window of a wave [N]: ``[windows, dim]``."""
        return self.embedding(self.sat.windows(OVERLAP).split(wave[None])[0])

    @torch.no_grad()
    def show(self, recording: Recording) -> page.Clip:
        """The source, then takes: each window made anew from the embedding of the source's, and cross-faded."""
        source, stem, add = recording.wave, recording.stem, self.gallery.add
        conditions = self.conditions(source)
        shown = [page.Version("source", "", f"sounds/{stem}_source.wav", f"pictures/{stem}_source.png")]
        for take in range(TAKES):
            codes = self.aar.sample(conditions, seed=self.seed + take * len(conditions))
            wave = self.sat.decode(codes[None], len(source), OVERLAP)[0, 0]
            shown.append(add(f"{stem}_take{take + 1}", wave, f"take {take + 1}", like=source))
        return page.Clip(recording.name, recording.kind, shown)

    @torch.no_grad()
    def unconditional(self) -> page.Clip:
        """One window each, from no condition at all."""
        codes = self.aar.sample(num=UNCONDITIONAL, seed=self.seed)
        waves = self.sat.decode(codes[:, None])[:, 0]
        shown = [self.gallery.add(f"unconditional_{i + 1:02d}", wave, f"{i + 1}") for i, wave in enumerate(waves)]
        return page.Clip("", "", shown)
