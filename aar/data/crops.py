"""Endless random crops for training. A batch depends on its number alone: a position in the data is one integer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import AudioError
from .cache import WaveCache
from .reading import cut, duration_of, read_crop
from .recordings import Recording

__all__ = ["Crops"]

TRIES = 100
"""Crops tried for one item before the data counts as broken altogether."""

_LOG = logging.getLogger("aar.data")


class Crops:
    """Batches of random crops, without end: ``{"wav": [B, 1, samples] float32, "index": [B] int64, "label": [str]}``.

    A recording is chosen as often as it is long, and a crop's place in it evenly; zeros follow one that is shorter than
    a crop. `index` is the recording's place in `recordings`.

    Batch number k holds the same crops whatever `workers` and `start`; batches k of all ranks, one after the other, are
    batch k of ``world=1, batch_size=world * batch_size``. To resume, pass the `position` that was reached as `start`.

    A recording that cannot be read is logged once, counted in `skipped`, and each crop of it replaced by another crop,
    also the same in every run.

    Args:
        recordings: see `find_audio`. Those without a duration are opened once here, for their headers.
        sample_rate: of the crops, in Hz.
        samples: of a crop.
        batch_size: of each rank.
        seed: 0 or more.
        workers: processes that read ahead; 0 reads in this one.
        rank, world: which part of each batch is this process's, of how many.
        start: number of the first batch.
        cache: directory for decoded and resampled recordings, where that is slow (mp3, ogg, opus, other rates). They
            come rounded to 16 bits.
        cache_bytes: bound of its size.

    Raises:
        AudioError: no recording can be read; also while iterating.
        ValueError: an impossible number.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        *,
        sample_rate: int,
        samples: int,
        batch_size: int,
        seed: int,
        workers: int = 2,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        cache: str | os.PathLike | None = None,
        cache_bytes: int = 16 << 30,
    ):
        for name, value, least in (
            ("sample_rate", sample_rate, 1), ("samples", samples, 1), ("batch_size", batch_size, 1), ("seed", seed, 0),
            ("workers", workers, 0), ("rank", rank, 0), ("world", world, rank + 1), ("start", start, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.recordings, self.workers, self.position = tuple(recordings), workers, start
        self._broken: set[int] = set()
        durations = self._measure()
        store = None
        if cache is not None:
            store = WaveCache(Path(cache), self.recordings, durations, sample_rate, cache_bytes)
        items = range(rank * batch_size, (rank + 1) * batch_size)
        self._batches = _Batches(self.recordings, durations, sample_rate, samples, items, seed, store)

    @property
    def skipped(self) -> int:
        """Recordings of which something could not be read, among the batches so far."""
        return len(self._broken)

    @property
    def seconds(self) -> float:
        """Of all recordings together."""
        return float(self._batches.ends[-1])

    def __iter__(self) -> Iterator[dict[str, object]]:
        """From `position` on, which moves with each batch that is taken."""
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=count(self.position),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            # Or the loader would draw from the generator of the training, which resumes with another number of draws.
            generator=torch.Generator(),
        )
        for batch in loader:
            self._note(batch.failures)
            if batch.crops is None:
                last = next(reversed(batch.failures.values()))
                raise AudioError(f"none of {TRIES} recordings tried in a row can be read; the last: {last}")
            self.position += 1
            yield batch.crops

    def _measure(self) -> list[float]:
        """Seconds of each recording; 0 for those that cannot be read."""

        def measure(recording: Recording) -> float | AudioError | OSError:
            try:
                return duration_of(recording)
            except (AudioError, OSError) as error:
                return error

        # Threads for storage that answers late; the work itself is a fraction of a millisecond.
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(measure, self.recordings)
            found = list(tqdm(found, "durations", len(self.recordings), leave=False, delay=2, unit=" recordings"))
        failures = {i: _reason(result) for i, result in enumerate(found) if isinstance(result, Exception)}
        if len(failures) == len(found):
            raise AudioError(f"no recording can be read; the first: {failures[0]}" if found else "no recordings")
        self._note(failures)
        return [0.0 if isinstance(result, Exception) else result for result in found]

    def _note(self, failures: dict[int, str]) -> None:
        for index, reason in failures.items():
            if index not in self._broken:
                self._broken.add(index)
                _LOG.warning("skipping %s", reason)


def _reason(error: AudioError | OSError) -> str:
    return str(error) if isinstance(error, AudioError) else f"{error.filename}: {error.strerror}"


class _Batch(NamedTuple):
    """Crops, or None where only broken recordings were found; and why which recordings could not be read."""

    crops: dict[str, object] | None
    failures: dict[int, str]


class _Batches(Dataset):
    """Batch k of this rank at index k. Errors are returned, since a worker's are raised under another message."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        durations: Sequence[float],
        sample_rate: int,
        samples: int,
        items: range,
        seed: int,
        cache: WaveCache | None,
    ):
        self.recordings, self.ends = recordings, np.cumsum(durations)
        self.sample_rate, self.samples, self.items, self.seed, self.cache = sample_rate, samples, items, seed, cache

    def __getitem__(self, number: int) -> _Batch:
        failures: dict[int, str] = {}
        waves, chosen = [], []
        for item in self.items:
            random = np.random.default_rng(np.random.SeedSequence([self.seed, number, item]))
            for _ in range(TRIES):
                at, place = random.random(2)
                index = self._choose(at)
                try:
                    waves.append(self._crop(self.recordings[index], place))
                    chosen.append(index)
                    break
                except (AudioError, OSError) as error:
                    failures[index] = _reason(error)
            else:
                return _Batch(None, failures)
        labels = [self.recordings[i].label for i in chosen]
        wav = torch.from_numpy(np.stack(waves)).unsqueeze(1)
        return _Batch({"wav": wav, "index": torch.tensor(chosen), "label": labels}, failures)

    def _choose(self, at: float) -> int:
        index = int(np.searchsorted(self.ends, at * self.ends[-1], side="right"))
        return min(index, len(self.ends) - 1)

    def _crop(self, recording: Recording, place: float) -> np.ndarray:
        stored = None if self.cache is None else self.cache.wave(recording)
        if stored is None:
            return read_crop(recording, place, self.samples, self.sample_rate)
        return WaveCache.samples(cut(stored, place, self.samples))
