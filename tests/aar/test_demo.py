"""The demo: a run of three steps leaves a whole page behind; the embedded clips are what SOURCES.md says."""

from __future__ import annotations

import argparse
import html.parser
import re
import struct
import zlib

import numpy as np
import pytest
import soundfile
import torch

import aar_kernels as ak
from aar import SAT, demo
from aar.demo import comparison, page, picture, recordings, synthesize, training
from aar.errors import AudioError
from aar.training.initialization import preserve_variance

CLIPS = sorted(recordings.CLIPS.glob("*.flac"))


class Page(html.parser.HTMLParser):
    """What a page refers to, and the text of its tables' cells."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: dict[str, list[str]] = {"audio": [], "img": []}
        self.rows: list[list[str]] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in self.sources:
            self.sources[tag].append(dict(attributes)["src"])
        if tag == "tr":
            self.rows.append([])
        self.cell = tag == "td"

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        if self.cell:
            self.rows[-1].append(data)


def read_png(path) -> np.ndarray:
    """Palette indices [height, width] of a PNG without row filters; checks every chunk's sum."""
    data, chunks = path.read_bytes(), {}
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour, len(chunks[b"PLTE"])) == (8, 3, 768)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Directory of a demo of three steps, as the command line runs it, and its model."""
    directory = tmp_path_factory.mktemp("demo")
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    arguments = [str(directory), "--steps", "3", "--save-model", str(directory / "model")]
    demo.run_from_args(parser.parse_args(arguments))
    return directory


def test_players_play_sounds_of_the_right_length(shown):
    sounds = Page((shown / "index.html").read_text()).sources["audio"]
    assert len(sounds) == len(set(sounds)) == 6 * len(CLIPS)
    for sound in sounds:
        clip = re.fullmatch(r"sounds/(\w+)_(?:source|scale\d\d)\.wav", sound)[1]
        samples, rate = soundfile.read(shown / sound)
        assert rate == 24_000
        assert len(samples) == soundfile.info(recordings.CLIPS / f"{clip}.flac").frames
        assert np.abs(samples).max() > 0


def test_sources_are_the_clips(shown):
    for clip in CLIPS:
        source, _ = soundfile.read(shown / "sounds" / f"{clip.stem}_source.wav")
        np.testing.assert_allclose(source, soundfile.read(clip)[0], rtol=0, atol=2**-15)


def test_pictures_decode(shown):
    pictures = Page((shown / "index.html").read_text()).sources["img"]
    assert len(pictures) == 6 * len(CLIPS)
    for path in pictures:
        pixels = read_png(shown / path)
        assert pixels.shape[0] == 96
        assert pixels.max() > pixels.min()


def test_page_needs_nothing_from_elsewhere(shown):
    text = (shown / "index.html").read_text()
    assert not re.search(r"https?:|<script|<link", text)


def test_tables(shown):
    rows = [row for row in Page((shown / "index.html").read_text()).rows if row]
    quality, speed = rows[:5], rows[5:]
    assert [row[:3] for row in quality] == [
        ["1", "1", "0.01"],
        ["5", "23", "0.23"],
        ["9", "100", "1.00"],
        ["13", "269", "2.69"],
        ["16", "479", "4.79"],
    ]
    assert all(float(cell) > 0 for row in quality for cell in row[3:])
    assert len(speed) == 4
    for _, plain, fast, factor in speed:
        ratio = float(plain.removesuffix(" ms")) / float(fast.removesuffix(" ms"))
        assert float(factor.removesuffix(" x")) == pytest.approx(ratio, rel=0.1, abs=0.1)


def test_saved_model_is_the_one_that_was_heard(shown):
    sat = SAT.from_pretrained(shown / "model")
    clip = CLIPS[0]
    waves = sat.reconstruct_scales(
        torch.from_numpy(soundfile.read(clip, dtype="float32")[0])[None, None], [16], 0.05
    )
    heard, _ = soundfile.read(shown / "sounds" / f"{clip.stem}_scale16.wav", dtype="float32")
    torch.testing.assert_close(torch.from_numpy(heard), waves[0, 0, 0].clamp(-1, 1), rtol=0, atol=2**-14)


def test_steps_and_seed_decide_the_model(tmp_path):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sat = SAT(demo.CONFIG)
            training.train(sat, [torch.randn(30_000)], minutes=1.0, steps=2, seed=seed)
        return sat.state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["quantizer.codebooks"], other["quantizer.codebooks"])


def test_training_by_the_clock_ends():
    torch.manual_seed(0)
    losses = training.train(SAT(demo.CONFIG), [torch.randn(30_000)], minutes=0.001, seed=0)
    assert losses
    assert all(np.isfinite(losses))


def test_fresh_model_lets_the_signal_through():
    torch.manual_seed(0)
    sat = SAT(demo.CONFIG)
    preserve_variance(sat)
    latents = sat.encoder(0.3 * torch.randn(2, 1, 24_000))
    assert (latents - latents.mean((0, 2), keepdim=True)).std() > 0.1


@pytest.mark.parametrize("problem", ["empty", "short"])
def test_unusable_recordings_are_named(tmp_path, problem):
    if problem == "short":
        soundfile.write(tmp_path / "speech_click.wav", np.zeros(100), 24_000)
    with pytest.raises(AudioError, match="speech_click" if problem == "short" else "no recordings"):
        recordings.load(tmp_path, 24_000)


@pytest.mark.parametrize("argument", ["--minutes=0", "--steps=-1", "--steps=x"])
def test_arguments_that_mean_nothing_are_refused(argument, capsys):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([argument])
    assert argument.split("=")[0] in capsys.readouterr().err


class Swapped(ak.nn.MultiScaleResidualQuantizer):
    """A quantizer whose fast path answers `answer` instead."""

    answer: torch.Tensor

    def encode(self, x, *, mask=None, backend=None):
        return super().encode(x, mask=mask, backend=backend) if backend else self.answer


def quantizer_with_a_tie() -> tuple[Swapped, torch.Tensor, torch.Tensor]:
    """Codes 0 and 1 of scale 1 are the same row; returns latents whose true codes hold a 0 there."""
    torch.manual_seed(0)
    schedule = ak.ScaleSchedule((1, 2, 4))
    quantizer = Swapped(
        8, schedule=schedule, codebook_size=16, phi_kernel_sizes=(3,), phi_sharing="full"
    ).eval()
    quantizer.codebooks[1, 1] = quantizer.codebooks[1, 0]
    latents = torch.randn(400, 8, 4)
    codes = quantizer.encode(latents, backend="reference")
    holds = (codes[:, 1] == 0).nonzero()[0, 0]
    return quantizer, latents[holds, None], codes[holds, None]


def test_differences_are_judged_in_float64():
    quantizer, latents, codes = quantizer_with_a_tie()

    def judge(position: int, code: int) -> comparison.Agreement:
        quantizer.answer = codes.clone()
        quantizer.answer[0, position] = code
        return comparison.compare_codes(quantizer, latents)

    assert judge(1, 0) == comparison.Agreement(windows=1, equal=1, ties=0, wrong=0)
    assert judge(1, 1) == comparison.Agreement(windows=1, equal=0, ties=1, wrong=0)
    assert judge(1, 5) == comparison.Agreement(windows=1, equal=0, ties=0, wrong=1)
    assert "1 WRONG" in str(judge(1, 5))


def test_text_of_a_table_is_aligned():
    table = page.Table("What", ["", "ms"], [["one", "1.5"], ["seven", "10.0"]])
    assert table.text() == "What\n           ms\n  one     1.5\n  seven  10.0"


def test_page_escapes_names():
    version = page.Version("<b>", "&", 'a".wav', "b.png")
    text = page.render("x < y", ["p & q"], [], [page.Clip("<i>", "<u>", [version])])
    assert "x &lt; y" in text
    assert "p &amp; q" in text
    assert not re.search(r"<i>|<u>|a\"\.wav", text)


def test_loud_tone_is_bright_where_it_belongs(tmp_path):
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(24_000) / 24_000)
    painter = picture.SpectrogramPainter(24_000)
    painter.paint(tmp_path / "tone.png", tone, painter.loudest(tone))
    pixels = read_png(tmp_path / "tone.png")
    # 1 kHz is 15 of 52 mel: 28 of 96 bands from the bottom.
    assert abs(int(pixels[:, 90].argmax()) - (95 - 28)) <= 1
    assert pixels[:, 90].max() >= 250


def test_clips_are_small_and_of_every_kind():
    assert sum(clip.stat().st_size for clip in CLIPS) < 2_000_000
    assert {clip.stem.split("_")[0] for clip in CLIPS} == {"speech", "effects", "music"}


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.stem)
def test_clip(clip):
    samples, rate = soundfile.read(clip)
    assert (samples.ndim, rate) == (1, 24_000)
    assert 1.0 < len(samples) / rate < 6.0
    assert np.sqrt(np.mean(samples**2)) > 0.03
    assert np.abs(samples).max() < 1.0
    assert f"`{clip.name}`" in (recordings.CLIPS / "SOURCES.md").read_text()


@pytest.mark.parametrize("name", synthesize.SOUNDS)
def test_music_is_what_our_script_makes(name):
    committed, _ = soundfile.read(recordings.CLIPS / f"music_{name}.flac")
    np.testing.assert_allclose(committed, synthesize.render(name), rtol=0, atol=2**-14)
