"""Finds recordings: in folders, lists, jsonl manifests, AudioSet's layout, and WebDataset's tar shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import soundfile

from ..audio import AUDIO_SUFFIXES
from ..errors import AarError
from .manifests import first_folder, read_list, read_manifest, read_segments
from .recordings import Recording
from .shards import read_shard

__all__ = ["SUFFIXES", "find_audio"]

# libsndfile names formats after their most common suffix; RAW says nothing of rate and channels.
_KNOWN = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"}
SUFFIXES = frozenset({*AUDIO_SUFFIXES, *_KNOWN, ".aif", ".aifc", ".oga"})


def find_audio(source: str | os.PathLike) -> list[Recording]:
    """All recordings of `source`, always in the same order. No recording is opened.

    Args:
        source: one of
            - a folder: every recording in its tree, and every member of its tar shards;
            - a folder with AudioSet's ``*_segments.csv`` at its top, or such a csv: those of its clips that lie in the
              csv's folder as YTID.mp3 (or any format, or ``Y`` before the name);
            - ``.jsonl``: a manifest, one ``{"path": ..., "start"?, "duration"?, "label"?}`` a line, in seconds; other
              keys are ignored;
            - ``.txt``, ``.lst``, ``.list``: a path a line; lines that begin with # are comments;
            - ``.tar``: a WebDataset shard, uncompressed, in which ``NAME.cls`` or ``"label"`` in ``NAME.json`` labels
              NAME's recording;
            - one recording.

            Paths in a file are relative to it. Where no label is given, the first folder below `source` (or below
            the file's folder, or in the shard) is the label.

    Raises:
        AarError: `source` does not exist, holds no recording, or has a line that cannot be understood (its message
            says where).
    """
    source = Path(source)
    if source.is_dir():
        tables = sorted(source.glob("*segments*.csv"))
        found = [clip for table in tables for clip in _clips(table)] if tables else list(_tree(source))
    elif not source.exists():
        raise AarError(f"{source}: no such file or folder")
    else:
        found = _file(source)
    if not found:
        raise AarError(f"{source}: holds no recordings ({', '.join(AUDIO_SUFFIXES)}, ...)")
    return found


def _file(source: Path) -> list[Recording]:
    suffix = source.suffix.lower()
    if suffix == ".jsonl":
        return read_manifest(source)
    if suffix in (".txt", ".lst", ".list"):
        return read_list(source)
    if suffix == ".csv":
        return _clips(source)
    if suffix == ".tar":
        return list(read_shard(source, SUFFIXES))
    if suffix in SUFFIXES:
        return [Recording(source)]
    raise AarError(f"{source}: neither a recording nor a list of them (.jsonl, .txt, .csv, .tar)")


def _tree(root: Path) -> Iterator[Recording]:
    for path in _files(root):
        if path.suffix.lower() == ".tar":
            yield from read_shard(path, SUFFIXES)
        elif path.suffix.lower() in SUFFIXES:
            yield Recording(path, label=first_folder(path.relative_to(root)))


def _clips(table: Path) -> list[Recording]:
    """The clips of a table of AudioSet that are there; many of its videos no longer are."""
    files: dict[str, Path] = {}
    for path in _files(table.parent):
        if path.suffix.lower() in SUFFIXES:
            files.setdefault(path.stem, path)
    clips = []
    for segment in read_segments(table):
        path = files.get(segment.name) or files.get(f"Y{segment.name}")
        if path is not None:
            # The files hold the clip alone: its place in the video means nothing in them.
            clips.append(Recording(path, duration=segment.duration, label=segment.labels))
    if not clips:
        raise AarError(f"{table}: none of its clips lies in {table.parent} (as YTID.mp3)")
    return clips


def _files(root: Path) -> Iterator[Path]:
    """Visible files of a tree in sorted order, links followed."""
    seen = set()  # a link to a folder above it would be walked for ever
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


