"""WebDataset's tar shards, read with the standard library.

A tar file stores its members as they are, so that a recording in it is a range of bytes: it is found once, by a walk
over the headers that skips what lies between, and then read in any order as a file would be. That keeps crops random
over all the data, where a stream of shards needs buffers to shuffle in and cannot be resumed exactly.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from ..errors import AarError
from .manifests import first_folder
from .recordings import Recording

__all__ = ["read_shard"]


def read_shard(path: Path, suffixes: Collection[str]) -> Iterator[Recording]:
    """Members of a shard that end in one of `suffixes`.

    Raises:
        AarError: not an uncompressed tar file, or a label in it cannot be read.
    """
    found: list[Recording] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                if name.suffix.lower() in suffixes:
                    found.append(
                        Recording(path, member=member.name, offset=member.offset_data, size=member.size)
                    )
                elif name.suffix in (".cls", ".json"):
                    label = _label(shard.extractfile(member).read(), name.suffix)
                    if label is not None:
                        labels[_key(member.name)] = label
    except (tarfile.TarError, ValueError) as error:
        raise AarError(f"{path}: not an uncompressed tar shard that can be read: {error}") from None
    for recording in found:
        name = recording.member
        label = labels.get(_key(name), first_folder(PurePosixPath(name)))
        yield Recording(path, label=label, member=name, offset=recording.offset, size=recording.size)


def _key(name: str) -> str:
    """WebDataset's: all up to the first dot of the file's own name."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _label(content: bytes, suffix: str) -> str | None:
    text = content.decode().strip()
    if suffix == ".cls":
        return text
    entry = json.loads(text)
    return str(entry["label"]) if isinstance(entry, dict) and "label" in entry else None
