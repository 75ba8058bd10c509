"""Tokens and conditions made once, for a transformer to learn from many times.

A folder of ``shard-00000.safetensors`` (codes [N, total] int16 or int32, condition [N, dim] float32, recording [N]
int32: its place in the data), index.json (how they were made) and tokenizer/ (the SAT that made them).
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..atomic import replacing
from ..conditions import AcousticEmbedding, Clap
from ..data import Recording, find_audio, read_recording
from ..errors import AarError, AudioError
from ..models import SAT
from ..models.sat import WINDOWS_PER_BATCH
from .world import World

__all__ = ["Embedding", "TokenSet", "embedding", "tokenize"]

INDEX = "index.json"
_LOG = logging.getLogger("aar.training")


class Embedding(Protocol):
    """`AcousticEmbedding` or `Clap`."""

    dim: int

    def embed_audio(self, wavs: list[Tensor], sample_rate: int) -> Tensor: ...


def embedding(kind: str, clap: str, sample_rate: int, device: torch.device) -> Embedding | None:
    """Of the kind "acoustic", "clap" or "none".

    Raises:
        ConditionError: no CLAP.
    """
    if kind == "none":
        return None
    if kind == "acoustic":
        return AcousticEmbedding(sample_rate).to(device)
    found = Clap.from_pretrained(clap)
    found.model.to(device)
    return found


def tokenize(
    source: Path, out: Path, sat: SAT, world: World, *, condition: str, clap: str, overlap: float = 0.0,
    per_shard: int = 100, workers: int = 2, progress: Callable[[int], None] = lambda recordings: None,
) -> None:  # fmt: skip
    """Writes what is missing in `out`, so that a run that was stopped goes on; ranks take shards in turn.

    Recordings that cannot be read are logged and left out.

    Args:
        overlap: seconds that neighbouring windows share: more windows of the same recordings.
        per_shard: recordings in a shard.
        workers: threads that decode recordings while the model works, up to two for each of them in memory.
        progress: is told how many recordings are done.

    Raises:
        AarError: nothing to tokenize, or `out` holds tokens that were made otherwise.
    """
    recordings = find_audio(source)
    index = {
        "source": str(source.absolute()), "recordings": len(recordings), "per_shard": per_shard, "overlap": overlap,
        "condition": condition, "clap": clap if condition == "clap" else None, "model": sat.fingerprint(),
        "sample_rate": sat.config.sample_rate,
    }  # fmt: skip
    if (out / INDEX).exists():
        differing = [name for name, value in _read_index(out).items() if index.get(name) != value]
        if differing:
            raise AarError(f"{out}: holds tokens made with another {differing[0]}; name another folder")
    elif world.rank == 0:
        sat.save_pretrained(out / "tokenizer")
        with replacing(out / INDEX) as path:
            path.write_text(json.dumps(index, indent=2) + "\n")
    embed = embedding(condition, clap, sat.config.sample_rate, world.device)
    parts = [range(first, min(first + per_shard, len(recordings))) for first in range(0, len(recordings), per_shard)]
    ours = [(_shard(out, shard), part) for shard, part in enumerate(parts) if shard % world.size == world.rank]
    missing = [(path, part) for path, part in ours if not path.exists()]
    progress(sum(len(part) for _, part in ours) - sum(len(part) for _, part in missing))
    wanted = [recordings[number] for _, part in missing for number in part]
    with closing(_read_ahead(wanted, sat.config.sample_rate, workers)) as waves:
        for path, part in missing:
            tensors: dict[str, list[Tensor]] = {"codes": [], "condition": [], "recording": []}
            for number, wave in zip(part, waves, strict=False):
                if wave is not None:
                    codes, conditions = _tokenize(wave.to(world.device), sat, embed, overlap)
                    tensors["codes"].append(codes)
                    tensors["condition"].append(conditions)
                    tensors["recording"].append(torch.full((len(codes),), number, dtype=torch.int32))
                progress(1)
            # A shard of broken recordings is an empty one.
            with replacing(path) as beside:
                safetensors.torch.save_file({name: torch.cat(t) for name, t in tensors.items() if t}, beside)


def _read_ahead(recordings: Sequence[Recording], sample_rate: int, workers: int) -> Iterator[Tensor | None]:
    """Waves [N] in the order of the recordings, None for one that cannot be read, which is logged.

    No more than two for each worker are held at once, with that which the caller works on.
    """
    upcoming, reading = iter(recordings), deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            for recording in islice(upcoming, 2 * workers - 1 - len(reading)):
                reading.append(pool.submit(read_recording, recording, sample_rate))
            if not reading:
                return
            try:
                wave = reading.popleft().result()
            except (AudioError, OSError) as error:
                _LOG.warning("skipping %s", error)
                wave = None
            yield wave
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()
def _tokenize(wave: Tensor, sat: SAT, embed: Embedding | None, overlap: float) -> tuple[Tensor, Tensor]:
    """Codes [windows, total] and conditions [windows, dim] of a wave [N]."""
    codes = sat.encode(wave[None, None], overlap)[0].cpu()
    conditions = torch.zeros(len(codes), 0)
    if embed is not None:
        windows = sat.windows(overlap).split(wave[None])[0]
        parts = (list(part) for part in windows.split(WINDOWS_PER_BATCH))
        conditions = torch.cat([embed.embed_audio(part, sat.config.sample_rate).float().cpu() for part in parts])
    return codes.to(torch.int16 if sat.config.codebook_size <= 1 << 15 else torch.int32), conditions


class TokenSet:
    """All tokens of a folder, in memory: 1.7 kB a window of 455 codes with its acoustic embedding.

    Raises:
        AarError: no such folder, or one that `aar tokenize` has not finished.
    """

    def __init__(self, folder: Path):
        index = _read_index(folder)
        self.condition, self.clap = index["condition"], index["clap"]
        self.tokenizer = SAT.from_pretrained(folder / "tokenizer")
        paths = [_shard(folder, i) for i in range(-(-index["recordings"] // index["per_shard"]))]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise AarError(f"{folder}: {len(missing)} of {len(paths)} shards are missing; run `aar tokenize` again")
        try:
            shards = [shard for shard in map(safetensors.torch.load_file, paths) if shard]
        except safetensors.SafetensorError as error:
            raise AarError(f"{folder}: a shard is damaged: {error}") from None
        if not shards:
            raise AarError(f"{folder}: holds no tokens: no recording could be read")
        self.codes = torch.cat([shard["codes"] for shard in shards])
        self.conditions = torch.cat([shard["condition"] for shard in shards])

    def __len__(self) -> int:
        return len(self.codes)

    def batches(self, batch_size: int, seed: int, world: World, start: int) -> Iterator[dict[str, Tensor]]:
        """Endless ``{"codes": [B, total] int64, "condition": [B, dim]}``, in another order each time through.

        Batch k depends on the seed, k and the world alone; those of all ranks together are the batch of one process.
        """

        @lru_cache(maxsize=2)  # a batch may hold the end of one order and the beginning of the next
        def order(epoch: int) -> Tensor:
            return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(self)))

        while True:
            first = (start * world.size + world.rank) * batch_size
            items = [divmod(item, len(self)) for item in range(first, first + batch_size)]
            chosen = torch.stack([order(epoch)[place] for epoch, place in items])
            yield {"codes": self.codes[chosen].long(), "condition": self.conditions[chosen]}
            start += 1


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _read_index(folder: Path) -> dict:
    try:
        return json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        raise AarError(f"{folder}: no tokens; `aar tokenize DATA {folder} --model SAT` makes them") from None
    except ValueError:
        raise AarError(f"{folder / INDEX}: damaged; tokenize into another folder") from None
