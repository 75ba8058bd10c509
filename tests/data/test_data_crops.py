"""Crops: what a batch depends on, and what it does not."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from data_files import RATE, corpus, signal, write

from aar.data import Crops, Recording, find_audio
from aar.errors import AudioError

SAMPLES = 6000


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return find_audio(corpus(tmp_path_factory.mktemp("corpus")))


def crops(recordings, **options) -> Crops:
    settings = {"sample_rate": RATE, "samples": SAMPLES, "batch_size": 4, "seed": 3, "workers": 0, **options}
    return Crops(recordings, **settings)


def take(source: Crops, count: int) -> list[dict]:
    return list(itertools.islice(source, count))


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["wav"], b["wav"])
        assert torch.equal(a["index"], b["index"])
        assert a["label"] == b["label"]


def test_a_batch(recordings):
    (batch,) = take(crops(recordings), 1)
    assert (batch["wav"].shape, batch["wav"].dtype) == ((4, 1, SAMPLES), torch.float32)
    assert (batch["index"].shape, batch["index"].dtype) == ((4,), torch.int64)
    assert batch["label"] == [recordings[i].label for i in batch["index"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(recordings, workers):
    assert_same(take(crops(recordings, workers=workers), 7), take(crops(recordings), 7))


def test_seeds_and_batches_differ(recordings):
    one, two = take(crops(recordings), 2)
    (other,) = take(crops(recordings, seed=4), 1)
    assert not torch.equal(one["wav"], two["wav"])
    assert not torch.equal(one["wav"], other["wav"])


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_uninterrupted(recordings, workers):
    whole = take(crops(recordings), 6)
    source = crops(recordings, workers=workers)
    first = take(source, 2)
    assert source.position == 2  # of what was taken, however far workers read ahead
    rest = take(crops(recordings, workers=workers, start=source.position), 4)
    assert_same(first + rest, whole)
    assert_same(take(source, 4), whole[2:])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_joint_batch(recordings, world):
    size = 8 // world
    parts = [take(crops(recordings, batch_size=size, rank=r, world=world, workers=r % 2), 3) for r in range(world)]
    joint = [
        {"wav": torch.cat([p["wav"] for p in step]), "index": torch.cat([p["index"] for p in step]),
         "label": [label for p in step for label in p["label"]]}
        for step in zip(*parts, strict=True)
    ]  # fmt: skip
    assert_same(joint, take(crops(recordings, batch_size=8), 3))


def test_training_draws_no_other_numbers(recordings):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(crops(recordings, workers=1), 2)
    assert torch.equal(torch.rand(3), expected)


def test_recordings_are_chosen_by_duration(recordings):
    (batch,) = take(crops(recordings, samples=8, batch_size=4000), 1)
    part = np.bincount(batch["index"], minlength=5) / 4000
    seconds = np.array([1.5, 3.0, 2.0, 1.0, 0.3])  # of e, music/a, music/b, speech/c, speech/d
    # Four standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(part, seconds / seconds.sum(), rtol=0, atol=4 * np.sqrt(0.25 / 4000))
    assert crops(recordings).seconds == pytest.approx(seconds.sum(), abs=0.01)


def test_places_cover_a_recording(tmp_path):
    ramp = np.linspace(0, 0.9, 2400, dtype=np.float32)[:, None]
    recording = Recording(write(tmp_path / "a.flac", ramp))
    (batch,) = take(crops([recording], samples=240, batch_size=2000), 1)
    starts = batch["wav"][:, 0, 0] / 0.9 * 2399
    assert starts.min() < 20
    assert starts.max() > 2140
    assert starts.mean() == pytest.approx(1080, abs=4 * 624 / 2000**0.5)


@pytest.fixture
def partly_broken(tmp_path):
    corpus(tmp_path)
    whole = write(tmp_path / "speech" / "long.flac", signal(4.0, seed=9)).read_bytes()
    (tmp_path / "speech" / "long.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.wav").write_bytes(b"")
    return [*find_audio(tmp_path), Recording(tmp_path / "missing.wav", duration=2.0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_recordings_are_replaced_and_counted(partly_broken, caplog, workers):
    with caplog.at_level(logging.WARNING, "aar.data"):
        source = crops(partly_broken, workers=workers)
        assert source.skipped == 1  # known by its header
        batches = take(source, 12)
    assert source.skipped == 3
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for line, (name, reason) in zip(
        sorted(lines), [("empty.wav", "not audio"), ("missing.wav", "No such"), ("long.flac", "not audio")], strict=True
    ):
        assert line.startswith("skipping ")
        assert name in line
        assert reason in line
    assert all(batch["wav"].isfinite().all() for batch in batches)
    # Some of the truncated one can be read, none of the others.
    chosen = {partly_broken[i].path.name for batch in batches for i in batch["index"].tolist()}
    assert {"a.wav", "long.flac"} < chosen
    assert not {"empty.wav", "missing.wav"} & chosen
    assert_same(batches[5:], take(crops(partly_broken, start=5), 7))


@pytest.mark.parametrize("workers", [0, 1])
def test_all_broken(tmp_path, workers):
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"no recording can be read; the first: .*a\.wav: not audio"):
        crops(find_audio(tmp_path))
    gone = [Recording(tmp_path / "gone.wav", duration=1.0)]
    with pytest.raises(AudioError, match=r"none of 100 recordings tried in a row can be read; the last: .*gone\.wav"):
        take(crops(gone, workers=workers), 1)
    with pytest.raises(AudioError, match="no recordings"):
        crops([])


@pytest.mark.parametrize(
    "bad", [{"samples": 0}, {"batch_size": 0}, {"seed": -1}, {"rank": 2, "world": 2}, {"start": -1}, {"workers": -1}]
)
def test_impossible_numbers(recordings, bad):
    with pytest.raises(ValueError, match=f"{'world' if 'rank' in bad else next(iter(bad))} must be at least"):
        crops(recordings, **bad)
