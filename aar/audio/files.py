"""Recordings: read at any rate and channel count as mono at the model's rate; written whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from ..atomic import replacing
from ..errors import AudioError

__all__ = ["AUDIO_SUFFIXES", "AudioInfo", "audio_info", "check_suffix", "open_audio", "read_audio", "write_audio"]

# suffix -> libsndfile's container and encoding. Reading goes by content, so these bind only what is written.
_FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
AUDIO_SUFFIXES = tuple(_FORMATS)

# libsndfile's Vorbis encoder keeps a whole write on the stack and overflows it on long recordings.
_SAMPLES_PER_WRITE = 1 << 16


class AudioInfo(NamedTuple):
    """Sample rate in Hz, channels, samples per channel, and libsndfile's name of the format."""

    sample_rate: int
    channels: int
    num_samples: int
    format: str


def read_audio(path: str | os.PathLike, sample_rate: int = 24000) -> Tensor:
    """Reads wav, flac, ogg, mp3 or opus: the mean of all channels at `sample_rate`, [N >= 1] float32.

    Raises:
        AudioError: not a recording, empty, shorter than one sample at `sample_rate`, or with NaN or infinite
            samples.
        OSError: the file does not exist or may not be read.
    """
    with open_audio(path) as file:
        samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    if not len(samples):
        raise AudioError(f"{path}: the recording is empty")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: the recording holds NaN or infinite samples; export it again")
    mono = samples.mean(axis=1)
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate)
    if not len(mono):
        raise AudioError(f"{path}: the recording is shorter than one sample at {sample_rate} Hz")
    return torch.from_numpy(np.ascontiguousarray(mono))


def audio_info(path: str | os.PathLike) -> AudioInfo:
    """Reads the head of a recording.

    Raises:
        AudioError: not a recording.
        OSError: the file does not exist or may not be read.
    """
    with open_audio(path) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames, f"{file.format} {file.subtype}")


def write_audio(path: str | os.PathLike, samples: Tensor, sample_rate: int = 24000) -> None:
    """Writes [N] floating-point samples, clipped to -1..1, in the format that the suffix names.

    Raises:
        AudioError: a suffix that names no known format, NaN samples, or a rate that the format does not know.
        ValueError: not one-dimensional.
        OSError: the file cannot be written.
    """
    path = Path(path)
    container, encoding = check_suffix(path)
    if samples.dim() != 1:
        raise ValueError(f"samples must be [N], got {list(samples.shape)}")
    if not torch.isfinite(samples).all():
        raise AudioError(f"{path}: refusing to write NaN or infinite samples")
    values = samples.detach().float().clamp(-1, 1).cpu().numpy()
    with replacing(path) as beside:
        # libsndfile says "System error" where this raises the true reason.
        beside.touch()
        try:
            with soundfile.SoundFile(beside, "w", sample_rate, 1, encoding, format=container) as file:
                for start in range(0, len(values), _SAMPLES_PER_WRITE):
                    file.write(values[start : start + _SAMPLES_PER_WRITE])
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: cannot be written at {sample_rate} Hz: {error.error_string}") from None


class Section(io.RawIOBase):
    """`size` bytes from `offset` on of an open file, as a file of their own: a recording inside an archive."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int):
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(origin + place, 0)
        return self._place

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(self._size - self._place, 0)]
        self._file.seek(self._offset + self._place)
        count = self._file.readinto(view)
        self._place += count
        return count


@contextmanager
def open_audio(path: str | os.PathLike, offset: int = 0, size: int | None = None) -> Iterator[soundfile.SoundFile]:
    """Opens a recording for reading: a whole file, or `size` bytes of it.

    Raises:
        AudioError: not a recording, also where that only shows as the block reads it.
        OSError: the file does not exist or may not be read.
    """
    # Opened here and not by libsndfile, which says "System error" for a missing file.
    with open(path, "rb") as binary:
        try:
            with soundfile.SoundFile(binary if size is None else Section(binary, offset, size)) as file:
                yield file
        except (soundfile.LibsndfileError, TypeError) as error:
            reason = getattr(error, "error_string", error)
            raise AudioError(
                f"{path}: not audio that can be read ({', '.join(AUDIO_SUFFIXES)}): {reason}"
            ) from None


def check_suffix(path: Path) -> tuple[str, str]:
    """The container and encoding that `path` would be written in.

    Raises:
        AudioError: its suffix names no known format.
    """
    if path.suffix.lower() not in _FORMATS:
        raise AudioError(f"{path}: name an output that ends in one of {', '.join(AUDIO_SUFFIXES)}")
    return _FORMATS[path.suffix.lower()]
