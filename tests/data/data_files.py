"""Recordings for the tests of aar.data."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import soundfile

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
RATE = 24000


def signal(seconds: float, rate: int = RATE, seed: int = 0, channels: int = 1) -> np.ndarray:
    """[N, channels] float32: a glide in noise, different everywhere, so that a crop at another place shows."""
    t = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    glide = 0.3 * np.sin(2 * np.pi * (150 + 40 * seed + 90 * t) * t)
    return np.stack([glide + 0.05 * rng.standard_normal(len(t)) for _ in range(channels)], 1).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    container, encoding = FORMATS[path.suffix[1:]]
    with soundfile.SoundFile(path, "w", rate, samples.shape[1], encoding, format=container) as file:
        for part in np.split(samples, range(1 << 14, len(samples), 1 << 14)):
            file.write(part)
    return path


def corpus(root: Path) -> Path:
    """Three labels, five recordings of 0.3 to 3 seconds."""
    for i, (name, seconds) in enumerate(
        {"music/a.wav": 3.0, "music/b.flac": 2.0, "speech/c.ogg": 1.0, "speech/d.wav": 0.3, "e.wav": 1.5}.items()
    ):
        write(root / name, signal(seconds, seed=i))
    return root


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path
