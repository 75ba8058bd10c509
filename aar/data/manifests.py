"""Lists of recordings: one path a line, jsonl, and AudioSet's tables. Errors say file and line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from ..errors import AarError
from .recordings import Recording

__all__ = ["Segment", "first_folder", "read_list", "read_manifest", "read_segments"]


_KEYS = ("path", "start", "duration", "label")


class Segment(NamedTuple):
    """A row of AudioSet's table: video, seconds, and comma-separated labels as they stand there."""

    name: str
    duration: float
    labels: str


def read_list(path: Path) -> list[Recording]:
    """Recordings of a text file of paths, relative to it."""
    return [_placed(path, line) for _, line in _lines(path) if not line.startswith("#")]


def read_manifest(path: Path) -> list[Recording]:
    """Recordings of a jsonl manifest.

    Raises:
        AarError: a line is not a JSON object with "path", or one of its values is impossible.
    """
    found = []
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
            found.append(_placed(path, **{key: entry[key] for key in _KEYS if key in entry}))
        except (ValueError, TypeError) as error:
            wanted = '{"path": ..., "start"?: seconds, "duration"?: seconds, "label"?: text}'
            raise AarError(f"{path}:{number}: not {wanted}: {error}") from None
    return found


def read_segments(path: Path) -> Iterator[Segment]:
    """Rows ``YTID, start_seconds, end_seconds, "labels"`` of one of AudioSet's tables.

    Raises:
        AarError: a row of another kind.
    """
    for number, line in _lines(path):
        if line.startswith("#"):
            continue
        try:
            name, start, end, labels = next(csv.reader([line], skipinitialspace=True))
            duration = float(end) - float(start)
            if not 0 < duration < math.inf:
                raise ValueError(f"{start} to {end} seconds")
        except ValueError as error:
            wanted = 'YTID, start_seconds, end_seconds, "positive_labels"'
            raise AarError(f"{path}:{number}: not {wanted}: {error}") from None
        yield Segment(name, duration, labels)


def first_folder(path: PurePath) -> str:
    """The label that a relative path gives."""
    return path.parts[0] if len(path.parts) > 1 and not path.is_absolute() else ""


def _placed(
    manifest: Path, path: str, start: float = 0.0, duration: float | None = None, label: str | None = None
) -> Recording:
    """The recording that a line of `manifest` names."""
    if not isinstance(path, str) or not path:
        raise ValueError(f"path {path!r}")
    if not 0 <= start < math.inf:
        raise ValueError(f"start {start!r}")
    if duration is not None and not 0 < duration < math.inf:
        raise ValueError(f"duration {duration!r}")
    label = first_folder(PurePath(path)) if label is None else str(label)
    return Recording(manifest.parent / path, float(start), None if duration is None else float(duration), label)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError as error:
        raise AarError(f"{path}: not a text file: {error}") from None
