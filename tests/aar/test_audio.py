import numpy as np
import pytest
import soundfile
import torch
from small import files_under, noise

from aar.audio import AUDIO_SUFFIXES, audio_info, read_audio, write_audio
from aar.audio import files as audio_files
from aar.errors import AudioError


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_channel_count(tmp_path, rate, channels):
    path = tmp_path / "in.wav"
    soundfile.write(path, np.repeat(tone(440, 0.5, rate)[:, None], channels, axis=1), rate, subtype="FLOAT")
    wav = read_audio(path)
    assert wav.dtype == torch.float32
    assert wav.shape == (12000,)
    middle = slice(2000, 10000)  # a resampler rings where the tone begins and ends
    np.testing.assert_allclose(wav[middle], tone(440, 0.5, 24000)[middle], atol=2e-3)


def test_channels_are_averaged(tmp_path):
    left, right = noise(2, 1000)
    soundfile.write(tmp_path / "in.wav", torch.stack([left, right], 1).numpy(), 24000, subtype="FLOAT")
    torch.testing.assert_close(read_audio(tmp_path / "in.wav"), (left + right) / 2)


@pytest.mark.parametrize("suffix", AUDIO_SUFFIXES)
def test_every_format_goes_out_and_comes_in(tmp_path, suffix):
    path = tmp_path / f"new/out{suffix}"
    wave = torch.from_numpy(tone(440, 3.0, 24000))
    write_audio(path, wave)
    back = read_audio(path)
    assert files_under(tmp_path) == [f"new/out{suffix}"]
    assert abs(len(back) - len(wave)) <= 2400  # mp3 and opus fill their last frame
    spectrum = torch.fft.rfft(back[:72000]).abs()
    assert abs(spectrum.argmax().item() - 440 * len(back[:72000]) / 24000) <= 1
    if suffix in (".wav", ".flac"):
        torch.testing.assert_close(back, wave.float(), rtol=0, atol=1.5 / 2**15)
        assert audio_info(path)[:3] == (24000, 1, 72000)


def test_content_and_not_the_suffix_decides_how_a_file_is_read(tmp_path):
    write_audio(tmp_path / "a.flac", noise(500))
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.flac").read_bytes())
    assert len(read_audio(tmp_path / "a.wav")) == 500


def test_loud_samples_are_clipped_and_not_wrapped(tmp_path):
    write_audio(tmp_path / "out.wav", torch.tensor([2.0, -2.0, 0.0]))
    torch.testing.assert_close(
        read_audio(tmp_path / "out.wav"), torch.tensor([1.0, -1.0, 0.0]), rtol=0, atol=1 / 2**15
    )


def test_lossy_formats_are_clipped_too(tmp_path):
    write_audio(tmp_path / "out.ogg", torch.from_numpy(8 * tone(440, 1.0, 24000)))
    assert read_audio(tmp_path / "out.ogg").abs().max() < 1.5  # unclipped it would be 4


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_audio(tmp_path / "absent.wav")
    (tmp_path / "text.wav").write_text("no audio at all")
    with pytest.raises(AudioError, match="not audio"):
        read_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 24000)
    with pytest.raises(AudioError, match="empty"):
        read_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 24000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN"):
        read_audio(tmp_path / "nan.wav")
    soundfile.write(tmp_path / "short.wav", np.zeros(1), 192000)
    with pytest.raises(AudioError, match="shorter than one sample"):
        read_audio(tmp_path / "short.wav", 8000)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(AudioError, match=r"\.wav, \.flac"):
        write_audio(tmp_path / "out.xyz", noise(10))
    with pytest.raises(AudioError, match="NaN"):
        write_audio(tmp_path / "out.wav", torch.tensor([torch.nan]))
    with pytest.raises(AudioError, match="12345 Hz"):
        write_audio(tmp_path / "out.opus", noise(10), 12345)
    with pytest.raises(ValueError, match=r"\[N\]"):
        write_audio(tmp_path / "out.wav", noise(1, 10))
    assert files_under(tmp_path) == []


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.wav"
    path.write_bytes(b"before")

    class Full(soundfile.SoundFile):
        def write(self, data):
            super().write(data[: len(data) // 2])
            raise OSError("disk full")

    monkeypatch.setattr(audio_files.soundfile, "SoundFile", Full)
    with pytest.raises(OSError, match="disk full"):
        write_audio(path, noise(1000))
    assert files_under(tmp_path) == ["out.wav"]
    assert path.read_bytes() == b"before"
