"""Spectrogram pictures as palette PNG files, written with the standard library alone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from aar.audio.mel import LogMelSpectrogram

DYNAMIC_RANGE = 6.5
"""log10 of power shown below the loudest point: 65 dB."""

COLOURS = ((0, 0, 4), (27, 12, 65), (74, 12, 107), (120, 28, 109), (165, 44, 96),
           (207, 68, 70), (237, 105, 37), (251, 155, 6), (247, 209, 61), (252, 255, 164))  # fmt: skip
"""Even samples of matplotlib's inferno (public domain, CC0)."""


def palette() -> bytes:
    """256 RGB triples, linear between `COLOURS`."""
    anchors = torch.tensor(COLOURS, dtype=torch.float32)
    position = torch.linspace(0, len(COLOURS) - 1, 256)
    low = position.floor().clamp(max=len(COLOURS) - 2).long()
    colours = torch.lerp(anchors[low], anchors[low + 1], (position - low)[:, None])
    return colours.round().byte().numpy().tobytes()


def write_png(path: Path, pixels: Tensor) -> None:
    """Write palette indices uint8 [height, width], top row first (PNG specification, colour type 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    no_filter = b"\0"
    rows = b"".join(no_filter + row.tobytes() for row in pixels.numpy())
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"PLTE", palette()) + chunk(b"IDAT", zlib.compress(rows, 9))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))


class SpectrogramPainter:
    """Paints waves [N] as log-mel spectrograms, low frequencies at the bottom, 96 bands."""

    def __init__(self, sample_rate: int):
        self.spectrogram = LogMelSpectrogram(1024, 128, n_mels=96, sample_rate=sample_rate, floor=1e-9)

    def loudest(self, wave: Tensor) -> float:
        """The value that `paint` shows brightest: one for all versions of a clip, so that they compare."""
        return self.spectrogram(wave).max().item()

    def paint(self, path: Path, wave: Tensor, loudest: float) -> None:
        """Write the picture of a wave [N] to `path`."""
        level = (self.spectrogram(wave) - loudest) / DYNAMIC_RANGE + 1.0
        write_png(path, (255 * level.clamp(0.0, 1.0)).round().byte().flip(0))
