"""The cache of waves: same crops, decoded once, bounded."""

from __future__ import annotations

import errno
import logging
import os

import numpy as np
import pytest
import torch
from data_files import corpus, signal, write
from test_data_crops import assert_same, crops, take

from aar.data import cache as cache_module
from aar.data import find_audio

ROUNDING = 0.5 / (1 << 15) + 1e-6


@pytest.fixture
def root(tmp_path):
    corpus(tmp_path / "corpus")
    write(tmp_path / "corpus" / "music" / "f.mp3", signal(2.0, 44100, seed=8), 44100)
    return tmp_path / "corpus"


@pytest.fixture
def decoded(monkeypatch):
    """Names of recordings that were decoded whole, in order."""
    seen, read = [], cache_module.read_recording
    monkeypatch.setattr(cache_module, "read_recording", lambda r, rate: seen.append(r.path.name) or read(r, rate))
    return seen


def size_of(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("workers", [0, 2])
def test_same_crops_as_without(root, tmp_path, workers):
    recordings, where = find_audio(root), tmp_path / "cache"
    plain = take(crops(recordings), 8)
    cold = take(crops(recordings, cache=where, workers=workers), 8)
    warm = take(crops(recordings, cache=where, workers=workers), 8)
    assert_same(cold, warm)
    for a, b in zip(cold, plain, strict=True):
        torch.testing.assert_close(a["wav"], b["wav"], rtol=0, atol=ROUNDING)
    assert len(list(where.rglob("*.npy"))) == 2  # ogg and mp3; wav and flac at 24 kHz need none


def test_decoded_once(root, tmp_path, decoded):
    recordings = find_audio(root)
    for _ in range(2):
        take(crops(recordings, cache=tmp_path / "cache"), 8)
    assert sorted(decoded) == ["c.ogg", "f.mp3"]


@pytest.mark.parametrize("changes", ["time", "size"])
def test_changed_recording_is_decoded_again(root, tmp_path, decoded, changes):
    recordings = find_audio(root / "music" / "f.mp3")
    before_time = (root / "music" / "f.mp3").stat().st_mtime_ns
    (before,) = take(crops(recordings, cache=tmp_path / "cache"), 1)
    write(root / "music" / "f.mp3", signal(2.0, 44100, seed=5), 44100)
    if changes == "size":
        (root / "music" / "f.mp3").write_bytes((root / "music" / "f.mp3").read_bytes() + bytes(100))
    os.utime(root / "music" / "f.mp3", ns=(1, 1 if changes == "time" else before_time))
    (after,) = take(crops(recordings, cache=tmp_path / "cache"), 1)
    assert decoded == ["f.mp3", "f.mp3"]
    (plain,) = take(crops(recordings), 1)
    torch.testing.assert_close(after["wav"], plain["wav"], rtol=0, atol=ROUNDING)
    assert (after["wav"] - before["wav"]).abs().max() > 0.1


def test_rates_are_kept_apart(root, tmp_path):
    recordings = find_audio(root / "music" / "f.mp3")
    for rate in (24000, 16000):
        (cached,) = take(crops(recordings, cache=tmp_path / "cache", sample_rate=rate), 1)
        (plain,) = take(crops(recordings, sample_rate=rate), 1)
        torch.testing.assert_close(cached["wav"], plain["wav"], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None], ids=["empty", "header", "cut"])
def test_damaged_file_is_replaced(root, tmp_path, decoded, damage):
    recordings = find_audio(root / "music" / "f.mp3")
    before = take(crops(recordings, cache=tmp_path / "cache"), 1)
    (path,) = (tmp_path / "cache").rglob("*.npy")
    path.write_bytes(path.read_bytes()[:5000] if damage is None else damage)
    assert_same(take(crops(recordings, cache=tmp_path / "cache"), 1), before)
    assert decoded == ["f.mp3", "f.mp3"]
    assert len(np.load(path)) == 48000


def test_size_is_bounded(tmp_path):
    where, bound = tmp_path / "cache", 3 * 50000  # three of a second each

    def kept(name: str, count: int) -> dict:
        for i in range(count):
            write(tmp_path / name / f"{i}.ogg", signal(1.0, seed=i))
        take(crops(find_audio(tmp_path / name), cache=where, cache_bytes=bound), 10)
        assert size_of(where) <= bound
        return {path: path.stat().st_mtime_ns for path in where.rglob("*.npy")}

    first = kept("first", 4)
    assert len(first) == 3
    second = kept("second", 2)
    youngest = max(first, key=first.get)
    assert len(second) == 3
    assert set(first) & set(second) == {youngest}
    take(crops(find_audio(tmp_path / "second"), cache=where, cache_bytes=bound), 10)
    assert second == {path: path.stat().st_mtime_ns for path in where.rglob("*.npy")}


def test_full_disk_stops_the_cache_alone(root, tmp_path, monkeypatch, caplog):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module.np, "save", full)
    recordings = find_audio(root)
    with caplog.at_level(logging.WARNING, "aar.data"):
        source = crops(recordings, cache=tmp_path / "cache")
        batches = take(source, 8)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'cache'}: no more recordings are kept here: No space left on device"
    ]
    assert source.skipped == 0
    assert size_of(tmp_path / "cache") == 0
    for a, b in zip(batches, take(crops(recordings), 8), strict=True):
        torch.testing.assert_close(a["wav"], b["wav"], rtol=0, atol=ROUNDING)


def test_sound_parts_of_broken_recordings_are_used_all_the_same(root, tmp_path, decoded):
    broken = root / "music" / "f.mp3"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    recordings = find_audio(broken)
    plain, cached = crops(recordings), crops(recordings, cache=tmp_path / "cache")
    assert_same(take(plain, 8), take(cached, 8))
    assert plain.skipped == cached.skipped == 1
    assert decoded == ["f.mp3"]  # once is enough to see that it is broken
