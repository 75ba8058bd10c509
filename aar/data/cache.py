"""Decoded and resampled recordings on disk, for those that are slow to decode again and again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..atomic import replacing
from ..errors import AudioError
from .reading import opened, read_recording
from .recordings import Recording

__all__ = ["WaveCache"]

LONGEST = 900.0
"""Seconds. Longer recordings are read piece by piece: who wants one second should not wait for hours to be decoded."""

_FULL_SCALE = 1 << 15

_LOG = logging.getLogger("aar.data")


class WaveCache:
    """Waves as 16-bit .npy files, memory-mapped; sound above full scale is clipped.

    Which recordings are kept is decided once, by their order and durations and not by what is read first: so the
    samples that training sees depend on no earlier run, and on no other process that shares the directory. Files of
    recordings that changed (by size or time of modification) are never read again, and removed when room is needed.

    Args:
        directory: made if new; nothing else may be in it.
        recordings, durations: what may be asked for, and seconds of each.
        sample_rate: of the kept waves, in Hz.
        max_bytes: bound of the directory's size.
    """

    def __init__(
        self,
        directory: Path,
        recordings: Sequence[Recording],
        durations: Sequence[float],
        sample_rate: int,
        max_bytes: int,
    ):
        self.directory, self.sample_rate = directory, sample_rate
        self._full = False
        self._kept: set[Recording] = set()
        room = max_bytes
        for recording, seconds in zip(recordings, durations, strict=True):
            needed = round(seconds * sample_rate) * 2 + 128
            if seconds <= LONGEST and needed <= room:
                room -= needed
                self._kept.add(recording)
        self._make_room(max_bytes - room, max_bytes)

    def wave(self, recording: Recording) -> np.ndarray | None:
        """``[N]`` int16, mapped or just decoded; None for a recording to read piece by piece: it is not kept, or as fast
        to read itself, or broken somewhere, when other pieces may still be sound.
        """
        if recording not in self._kept or self._full:
            return None
        path = self._path(recording)
        try:
            return np.load(path, mmap_mode="r")
        except FileNotFoundError:
            pass
        except (ValueError, EOFError):  # damaged
            path.unlink(missing_ok=True)
        if not self._is_slow(recording):
            return None
        try:
            wave = read_recording(recording, self.sample_rate).numpy()
        except AudioError:
            self._kept.discard(recording)  # or it would be decoded again for each piece
            return None
        wave = np.clip(np.rint(wave * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)
        try:
            with replacing(path) as beside:
                np.save(beside, wave)
        except OSError as error:
            self._full = True
            _LOG.warning("%s: no more recordings are kept here: %s", self.directory, error.strerror)
        return wave

    @staticmethod
    def samples(stored: np.ndarray) -> np.ndarray:
        """float32 of what `wave` gives, or a part of it."""
        return stored.astype(np.float32) / _FULL_SCALE

    def _is_slow(self, recording: Recording) -> bool:
        with opened(recording) as part:
            return part.rate != self.sample_rate or part.file.subtype in ("MPEG_LAYER_III", "VORBIS", "OPUS")

    def _path(self, recording: Recording) -> Path:
        status = recording.path.stat()
        what = (recording.start, recording.duration, recording.offset, recording.size, self.sample_rate)
        key = repr((str(recording.path.absolute()), status.st_mtime_ns, status.st_size, what))
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.directory / name[:2] / f"{name}.npy"

    def _make_room(self, wanted: int, max_bytes: int) -> None:
        """Removes files of other recordings, the oldest first, until `wanted` bytes more would fit."""
        self.directory.mkdir(parents=True, exist_ok=True)
        sizes = {path: path.stat() for path in self.directory.glob("*/*.npy")}
        if sum(status.st_size for status in sizes.values()) + wanted <= max_bytes:
            return
        for recording in self._kept:
            try:
                sizes.pop(self._path(recording), None)
            except OSError:
                continue  # it will be skipped as broken
        excess = sum(status.st_size for status in sizes.values()) + wanted - max_bytes
        for path, status in sorted(sizes.items(), key=lambda item: item[1].st_mtime_ns):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= status.st_size
