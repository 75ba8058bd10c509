"""Crops against slices of the whole recording."""

from __future__ import annotations

import math

import numpy as np
import pytest
import soundfile
import torch
from data_files import FORMATS, shard, signal, write

from aar.audio import read_audio
from aar.data import Recording, find_audio, read_recording
from aar.data.reading import cut, read_crop
from aar.errors import AudioError

# Of full scale: soxr's own rounding. A place off by one sample differs by a hundred thousand times that.
TOLERANCE = 1e-6


RATES = dict.fromkeys(FORMATS, (24000, 44100, 48000, 11111)) | {"opus": (24000, 48000), "mp3": (24000, 44100)}


@pytest.mark.parametrize(("suffix", "rate"), [(suffix, rate) for suffix in FORMATS for rate in RATES[suffix]])
def test_crop_is_a_slice_of_the_whole(tmp_path, suffix, rate):
    recording = Recording(write(tmp_path / f"a.{suffix}", signal(2.6, rate, channels=2), rate))
    whole = read_audio(recording.path, 24000).numpy()
    ours = read_recording(recording, 24000).numpy()
    assert len(ours) <= len(whole) <= len(ours) + 1
    np.testing.assert_allclose(ours, whole[: len(ours)], rtol=0, atol=TOLERANCE)
    for place in (0.0, 0.123456, 0.5, 0.77777, math.nextafter(1.0, 0.0)):
        crop = read_crop(recording, place, 9000, 24000)
        assert (crop.shape, crop.dtype) == ((9000,), np.float32)
        np.testing.assert_allclose(crop, cut(ours, place, 9000), rtol=0, atol=TOLERANCE)
    assert np.abs(read_crop(recording, 0.5, 9000, 24000) - cut(ours, 0.50006, 9000)).max() > 1e5 * TOLERANCE


def test_places_reach_both_ends_evenly():
    starts = [int(cut(np.arange(10.0), place, 8)[0]) for place in np.linspace(0, 1, 300, endpoint=False)]
    assert [starts.count(start) for start in range(3)] == [100, 100, 100]


def test_short_recordings_end_in_zeros(tmp_path):
    samples = signal(0.25)
    recording = Recording(write(tmp_path / "a.wav", samples))
    crop = read_crop(recording, 0.9, 24000, 24000)
    np.testing.assert_allclose(crop[:6000], samples[:, 0], rtol=0, atol=1e-4)
    assert not crop[6000:].any()
    assert len(read_recording(recording, 24000)) == 6000


def test_part_of_a_recording(tmp_path):
    samples = signal(3.0, 44100)
    part = Recording(write(tmp_path / "a.wav", samples, 44100), start=1.0, duration=0.5)
    same = Recording(write(tmp_path / "b.wav", samples[44100 : 44100 + 22050], 44100))
    torch.testing.assert_close(read_recording(part, 24000), read_recording(same, 24000), rtol=0, atol=0)
    np.testing.assert_array_equal(read_crop(part, 0.3, 4000, 24000), read_crop(same, 0.3, 4000, 24000))


def test_wave_decodes_little_more_than_the_crop(tmp_path, monkeypatch):
    recording = Recording(write(tmp_path / "a.flac", signal(20.0, 44100), 44100))
    read, decoded = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **k: decoded.append(n) or read(self, n, **k))
    read_crop(recording, 0.5, 24000, 24000)
    assert 44100 <= sum(decoded) < 44100 + 2000


def broken_files(folder):
    """Name -> (content, what the error says)."""
    whole = write(folder / "whole.flac", signal(2.0)).read_bytes()
    nan = signal(1.0)
    nan[12000:] = np.nan
    soundfile.write(folder / "nan.wav", nan, 24000, subtype="FLOAT")
    return {
        "empty.wav": (b"", "not audio"),
        "garbage.mp3": (b"\x00\x01garbage" * 300, "not audio|empty"),
        "silent.wav": (write(folder / "none.wav", signal(0.0)).read_bytes(), "empty"),
        "truncated.flac": (whole[: len(whole) // 2], "cut off|not audio"),
        "nan.wav": ((folder / "nan.wav").read_bytes(), "NaN"),
    }


@pytest.mark.parametrize("name", ["empty.wav", "garbage.mp3", "silent.wav", "truncated.flac", "nan.wav"])
@pytest.mark.parametrize("packed", [False, True], ids=["file", "shard"])
def test_broken_recordings(tmp_path, name, packed):
    content, message = broken_files(tmp_path)[name]
    if packed:
        recording = find_audio(shard(tmp_path / "a.tar", {name: content}))[0]
    else:
        (tmp_path / name).write_bytes(content)
        recording = Recording(tmp_path / name)
    with pytest.raises(AudioError, match=message) as caught:
        read_recording(recording, 24000)
    assert name in str(caught.value)
    with pytest.raises(AudioError, match=message):
        read_crop(recording, 0.999, 9000, 24000)


@pytest.mark.parametrize(("missing", "sound"), [(0.2, True), (0.3, False)])
def test_headers_may_promise_a_little_more(tmp_path, monkeypatch, missing, sound):
    recording = Recording(write(tmp_path / "a.wav", signal(2.0)))
    whole = read_recording(recording, 24000)
    read, left = soundfile.SoundFile.read, round((2.0 - missing) * 24000)

    def short(self, frames, **options):
        return read(self, max(min(frames, left - self.tell()), 0), **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", short)
    if sound:
        for rate in (24000, 16000):
            wave = read_recording(recording, rate)
            assert len(wave) == 2 * rate
            assert wave[round((2.0 - missing) * rate) + 500 :].abs().max() < TOLERANCE
        torch.testing.assert_close(read_recording(recording, 24000)[:left], whole[:left], rtol=0, atol=0)
        with pytest.raises(AudioError, match="cut off"):
            read_crop(recording, 0.999, 2000, 24000)  # nothing of it is left
    else:
        with pytest.raises(AudioError, match=r"a\.wav: is cut off at 1\.70 s"):
            read_recording(recording, 24000)


def test_start_beyond_the_end(tmp_path):
    path = write(tmp_path / "a.wav", signal(0.5))
    with pytest.raises(AudioError, match=r"a\.wav: ends before 2 s"):
        read_recording(Recording(path, start=2.0), 24000)
