"""The demo: a run of three steps leaves a whole page behind; the embedded clips are what SOURCES.md says."""

from __future__ import annotations

import argparse
import html.parser
import json
import re
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
import soundfile
import torch

import aar_kernels as ak
from aar import AAR, SAT, demo
from aar.conditions import AcousticEmbedding
from aar.demo import comparison, listening, making, page, picture, recordings, synthesize
from aar.errors import AarError, AudioError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


CHOSEN = ("speech_female", "speech_male", "effects_door", "music_bells")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Directory of a demo of a few clips, as the command line runs it, without the patience that timing needs."""
    clips, directory = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("demo")
    for name in CHOSEN:
        shutil.copy(recordings.CLIPS / f"{name}.flac", clips)
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "SECONDS", 0.0)
        patch.setattr(comparison, "CODEBOOKS", 1)
        demo.run_from_args(parser.parse_args([str(directory), "--clips", str(clips)]))
    return directory


def test_players_play_sounds_of_the_right_length(shown):
    """Each clip has its source (on both lists), five reconstructions and three takes; then a second each of nothing."""
    sounds = Page((shown / "index.html").read_text()).sources["audio"]
    assert len(sounds) == len(CHOSEN) * (6 + 1 + making.TAKES) + making.UNCONDITIONAL
    assert len(set(sounds)) == len(sounds) - len(CHOSEN)
    for sound in sounds:
        samples, rate = soundfile.read(shown / sound)
        assert rate == 24_000
        clip = re.fullmatch(r"sounds/(\w+)_(?:source|scale\d\d|take\d)\.wav", sound)
        assert len(samples) == (soundfile.info(recordings.CLIPS / f"{clip[1]}.flac").frames if clip else 24_000)
        assert np.abs(samples).max() > 0


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH")
def test_a_browser_can_play_every_sound(shown, tmp_path):
    """The page itself has no scripts: another one beside it loads every player's source and writes down what came."""
    sounds = sorted(set(Page((shown / "index.html").read_text()).sources["audio"]))
    script = """
        const sounds = %s, result = document.getElementById("result");
        const load = (sound) => new Promise((done) => {
            const audio = new Audio(sound);
            audio.oncanplaythrough = () => done(audio.duration);
            audio.onerror = () => done(-1);
        });
        Promise.all(sounds.map(load)).then((seconds) => { result.textContent = "[" + seconds + "]"; });
    """
    probe = shown / "probe.html"
    probe.write_text(f"<!doctype html><p id=result></p><script>{script % json.dumps(sounds)}</script>")
    try:
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom",
             "--no-first-run", "--disable-component-update", "--disable-sync", "--virtual-time-budget=60000",
             f"--user-data-dir={tmp_path}", probe.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        probe.unlink()
    seconds = json.loads(re.search(r"<p id=\"result\">(.*?)</p>", done.stdout)[1])
    frames = [soundfile.info(shown / sound).frames for sound in sounds]
    assert seconds == pytest.approx([count / 24_000 for count in frames], abs=0.01)


def test_sources_are_the_clips(shown):
    for name in CHOSEN:
        source, _ = soundfile.read(shown / "sounds" / f"{name}_source.wav")
        np.testing.assert_allclose(source, soundfile.read(recordings.CLIPS / f"{name}.flac")[0], rtol=0, atol=2**-15)


def test_pictures_decode(shown):
    for path in set(Page((shown / "index.html").read_text()).sources["img"]):
        pixels = read_png(shown / path)
        assert pixels.shape[0] == 96
        assert pixels.max() > pixels.min()


def test_page_needs_nothing_from_elsewhere(shown):
    text = (shown / "index.html").read_text()
    assert not re.search(r"https?:|<script|<link", text)


def test_tables(shown):
    rows = [row for row in Page((shown / "index.html").read_text()).rows if row]
    quality, quantizer, generation = rows[:5], rows[5:9], rows[9:]
    assert [row[:3] for row in quality] == [
        ["1", "1", "0.01"],
        ["5", "23", "0.23"],
        ["9", "100", "1.00"],
        ["13", "269", "2.69"],
        ["16", "479", "4.79"],
    ]
    assert all(float(cell) > 0 for row in quality for cell in row[3:])
    for _, plain, fast, factor in quantizer:
        ratio = float(plain.removesuffix(" ms")) / float(fast.removesuffix(" ms"))
        assert float(factor.removesuffix(" x")) == pytest.approx(ratio, rel=0.1, abs=0.1)
    assert len(generation) == 4
    assert generation[0][2] == "1.0 x"
    assert all(float(spent.removesuffix(" ms")) > 0 for _, spent, _ in generation)


def test_more_scales_are_nearer(shown):
    """Of a model that has learned, on clips that it has not heard."""
    rows = [row for row in Page((shown / "index.html").read_text()).rows if row][:5]
    distances = [float(row[-1]) for row in rows]
    assert distances[0] > distances[1] > distances[2] > distances[4]


def test_sounds_are_those_of_the_shipped_models(shown):
    sat, aar = SAT.from_pretrained("small"), AAR.from_pretrained("small")
    source = torch.from_numpy(soundfile.read(recordings.CLIPS / f"{CHOSEN[0]}.flac", dtype="float32")[0])
    waves = sat.reconstruct_scales(source[None, None], [16], listening.OVERLAP)[0, 0]
    windows = sat.windows(listening.OVERLAP).split(source[None])[0]
    codes = aar.sample(AcousticEmbedding()(windows))
    waves = torch.cat([waves, sat.decode(codes[None], len(source), listening.OVERLAP)[0]])
    for name, wave in zip(("scale16", "take1"), waves, strict=True):
        heard, _ = soundfile.read(shown / "sounds" / f"{CHOSEN[0]}_{name}.wav", dtype="float32")
        torch.testing.assert_close(torch.from_numpy(heard), wave.clamp(-1, 1), rtol=0, atol=2**-14)


def test_takes_differ(shown):
    takes = [soundfile.read(shown / "sounds" / f"{CHOSEN[0]}_take{i + 1}.wav")[0] for i in range(making.TAKES)]
    assert not np.array_equal(takes[0], takes[1])


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(AarError, match="--seed"):
        demo.run(tmp_path, seed=-1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("problem", ["empty", "short"])
def test_unusable_recordings_are_named(tmp_path, problem):
    if problem == "short":
        soundfile.write(tmp_path / "speech_click.wav", np.zeros(100), 24_000)
    with pytest.raises(AudioError, match="speech_click" if problem == "short" else "no recordings"):
        recordings.load(tmp_path, 24_000)


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
    sections = [page.Section("<s>", "t", [page.Clip("<i>", "<u>", [version])])]
    text = page.render("x < y", ["p & q"], [], sections)
    assert "x &lt; y" in text
    assert "p &amp; q" in text
    assert not re.search(r"<i>|<u>|<s>|a\"\.wav", text)


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
