"""Sounds and their pictures, written into the folder of the page that shows them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..audio import write_audio
from . import page
from .picture import SpectrogramPainter


class Gallery:
    """Writes below `sounds` and `pictures` of a directory."""

    def __init__(self, directory: Path, sample_rate: int):
        self.directory, self.rate = directory, sample_rate
        self.painter = SpectrogramPainter(sample_rate)
        for folder in ("sounds", "pictures"):
            (directory / folder).mkdir(parents=True, exist_ok=True)

    def add(self, stem: str, wave: Tensor, title: str, remark: str = "", like: Tensor | None = None) -> page.Version:
        """A wave [N] as STEM.wav and STEM.png, as bright as the wave `like` would be."""
        version = page.Version(title, remark, f"sounds/{stem}.wav", f"pictures/{stem}.png")
        write_audio(self.directory / version.sound, wave, self.rate)
        self.painter.paint(self.directory / version.picture, wave, self.painter.loudest(wave if like is None else like))
        return version
