"""Reads parts of recordings at a wanted rate, decoding little more than the part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from ..audio import open_audio
from ..errors import AudioError
from .recordings import Recording

__all__ = ["cut", "duration_of", "opened", "read_crop", "read_recording"]

MARGIN = 256
"""Samples, of either rate, that are resampled on both sides of a crop and dropped. soxr's filter reaches less than half
of that: with it, a crop differs from a slice of the whole by 2e-7 of full scale at most."""

SLACK = 0.25
"""Seconds that may be missing at the end of what is read, and are zeros then: headers of sound ogg files have been seen
to promise 0.13 s more than can be decoded."""


def read_recording(recording: Recording, sample_rate: int) -> Tensor:
    """The whole of it: the mean of all channels at `sample_rate`, [N >= 1] float32.

    Raises:
        AudioError: not a recording, empty, shorter than its header says, or with NaN or infinite samples.
        OSError: the file does not exist or may not be read.
    """
    with opened(recording) as part:
        return torch.from_numpy(part.read(0, part.length(sample_rate), sample_rate))


def read_crop(recording: Recording, place: float, samples: int, sample_rate: int) -> np.ndarray:
    """``[samples]`` float32, as `cut` takes them from the whole recording. Raises as `read_recording`.

    wav, flac and ogg are decoded at the crop alone. An mp3 is skimmed from its beginning: 0.14 ms of work for each
    second before the crop.
    """
    with opened(recording) as part:
        total = part.length(sample_rate)
        wave = part.read(_start(place, total, samples), min(total, samples), sample_rate)
    return np.pad(wave, (0, samples - len(wave)))


def cut(wave: np.ndarray, place: float, samples: int) -> np.ndarray:
    """``[samples]`` of ``wave[N]`` at `place`, from 0, its beginning, to 1, its end; zeros follow a short one."""
    start = _start(place, len(wave), samples)
    part = wave[start : start + samples]
    return np.pad(part, (0, samples - len(part)))


def duration_of(recording: Recording) -> float:
    """Seconds, by what the data or else the file's header says. Raises as `read_recording`."""
    if recording.duration is not None:
        return recording.duration
    with opened(recording) as part:
        return part.frames / part.rate


@contextmanager
def opened(recording: Recording) -> Iterator[_Part]:
    """Raises AudioError, with the recording's name, also for what the block finds wrong."""
    try:
        with open_audio(recording.path, recording.offset, recording.size) as file:
            yield _Part(file, recording)
    except AudioError as error:
        raise AudioError(f"{recording.member} in {error}" if recording.member else str(error)) from None


class _Part:
    """`frames` from `first` on of an open file."""

    def __init__(self, file: soundfile.SoundFile, recording: Recording):
        self.file, self.path, self.rate = file, recording.path, file.samplerate
        self.first = round(recording.start * self.rate)
        self.frames = file.frames - self.first
        if recording.duration is not None:
            # Tables round, and a clip may be a little shorter than they say.
            self.frames = min(self.frames, round(recording.duration * self.rate))
        if self.frames < 1:
            what = f"ends before {recording.start:g} s" if recording.start else "the recording is empty"
            raise AudioError(f"{self.path}: {what}")
        if file.frames > 1 << 40:
            raise AudioError(f"{self.path}: its header does not say how long it is")

    def length(self, sample_rate: int) -> int:
        """Samples at another rate."""
        total = self.frames * sample_rate // self.rate
        if not total:
            raise AudioError(f"{self.path}: shorter than one sample at {sample_rate} Hz")
        return total

    def read(self, start: int, samples: int, sample_rate: int) -> np.ndarray:
        """``[samples]`` from `start` on, both counted at `sample_rate`; must lie within `length`."""
        if sample_rate == self.rate:
            return self._decode(start, samples)
        # Both rates have a sample at each multiple of a block, so that a resampler may begin there.
        divisor = math.gcd(self.rate, sample_rate)
        ours, theirs = self.rate // divisor, sample_rate // divisor
        margin = -(-MARGIN // min(ours, theirs))
        first = max(start // theirs - margin, 0)
        last = min((-(-(start + samples) // theirs) + margin) * ours, self.frames)
        wave = soxr.resample(self._decode(first * ours, last - first * ours), self.rate, sample_rate)
        skipped = start - first * theirs
        wave = wave[skipped : skipped + samples]
        return np.pad(wave, (0, samples - len(wave)))  # soxr may round the last sample of a recording away

    def _decode(self, start: int, frames: int) -> np.ndarray:
        """``[frames]``, the mean of all channels."""
        self.file.seek(self.first + start)
        channels = self.file.read(frames, dtype="float32", always_2d=True)
        missing = frames - len(channels)
        if missing > SLACK * self.rate or not len(channels):
            seconds = (self.first + start + len(channels)) / self.rate
            raise AudioError(f"{self.path}: is cut off at {seconds:.2f} s; its header promises more")
        mono = channels.mean(axis=1)
        if not np.isfinite(mono).all():
            raise AudioError(f"{self.path}: the recording holds NaN or infinite samples; export it again")
        return np.pad(mono, (0, missing)) if missing else mono


def _start(place: float, total: int, samples: int) -> int:
    return int(place * max(total - samples + 1, 1))
