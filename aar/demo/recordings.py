"""The recordings that the demo trains on and shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..audio import AUDIO_SUFFIXES, read_audio
from ..errors import AudioError

CLIPS = Path(__file__).parent / "clips"
SHORTEST = 0.1
"""Seconds. Spectrograms extend a recording by reflection, which needs more of it than a window holds."""


@dataclass(frozen=True)
class Recording:
    """A wave [N] in -1..1, and what its file name, KIND_NAME, says of it."""

    kind: str
    name: str
    wave: Tensor

    @property
    def stem(self) -> str:
        return f"{self.kind}_{self.name}"


def load(directory: Path, sample_rate: int) -> list[Recording]:
    """All recordings of a directory, by kind and name; those without a kind are "other".

    Raises:
        AudioError: there are none, or one cannot be used.
        OSError: the directory cannot be read.
    """
    recordings = []
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            kind, separator, name = path.stem.partition("_")
            wave = read_audio(path, sample_rate)
            if len(wave) < SHORTEST * sample_rate:
                raise AudioError(f"{path}: shorter than {SHORTEST} seconds; leave it out")
            recordings.append(Recording(kind, name, wave) if separator else Recording("other", kind, wave))
    if not recordings:
        raise AudioError(f"{directory}: holds no recordings ({', '.join(AUDIO_SUFFIXES)})")
    rank = {kind: i for i, kind in enumerate(("speech", "effects", "music"))}
    return sorted(recordings, key=lambda recording: (rank.get(recording.kind, len(rank)), recording.stem))
