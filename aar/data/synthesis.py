"""Music and textures computed from formulas and a seed: sound to train on that asks for no licence.

The music is random phrases and beats on `instruments`; the textures are noise and oscillators under slow random
control: wind, rain, an engine, a siren, bubbles, crickets, a hum, a clock. Levels differ as those of recordings do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from . import instruments as make
from .instruments import SAMPLE_RATE, mix, times

__all__ = ["MUSIC", "TEXTURES", "render", "write"]

Random = np.random.Generator
_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), (0, 3, 5, 7, 10))


def _phrase(random: Random, low: int, high: int) -> list[tuple[float, int, float]]:
    """Start in seconds, pitch and length in seconds of notes that walk up and down a scale for about five seconds."""
    scale = np.array(_SCALES[random.integers(len(_SCALES))]) + random.integers(12)
    notes = [n for n in range(low, high) if (n - scale[0]) % 12 in (scale - scale[0]) % 12]
    beat, place, start, phrase = random.uniform(0.12, 0.45), int(random.integers(len(notes))), 0.0, []
    while start < 4.5:
        length = beat * random.choice((1, 1, 1, 2, 3))
        phrase.append((start, notes[place], length))
        if random.random() < 0.25:  # a third above
            phrase.append((start, notes[min(place + 2, len(notes) - 1)], length))
        place = int(np.clip(place + random.integers(-3, 4), 0, len(notes) - 1))
        start += length
    return phrase


def guitar(random: Random) -> np.ndarray:
    damping = random.uniform(0.985, 0.998)
    phrase = _phrase(random, 40, 72)
    return mix([(s, make.plucked_string(n, 1.5, int(random.integers(2**31)), damping)) for s, n, _ in phrase], 5.0)


def bells(random: Random) -> np.ndarray:
    ratio, index = random.choice((1.4, 1.41, 2.76, 3.5, 1.0)), random.uniform(1.0, 8.0)
    return mix([(s, make.fm_bell(n, 1.5, ratio, index)) for s, n, _ in _phrase(random, 60, 92)], 5.0)


def pad(random: Random) -> np.ndarray:
    phrase = _phrase(random, 45, 70)[::4]
    return mix([(s, make.pad_note(n, random.uniform(1.0, 2.5))) for s, n, _ in phrase], 5.0)


def organ(random: Random) -> np.ndarray:
    return mix([(s, make.organ_tone(n, length)) for s, n, length in _phrase(random, 48, 80)], 5.0)


def drums(random: Random) -> np.ndarray:
    """A bar of random hits, repeated, so that it has a beat."""
    step = random.uniform(0.09, 0.16)
    voices = ((0.4, lambda seed: make.kick()), (0.25, make.snare), (0.7, make.hi_hat))
    bar = [(i, voice) for likely, voice in voices for i in range(8) if random.random() < likely * (1.3 - i % 2)]
    bars = int(5.0 / (8 * step)) + 1
    hits = [((8 * b + i) * step, voice(int(random.integers(2**31)))) for b in range(bars) for i, voice in bar]
    return mix([(s, wave) for s, wave in hits if s < 4.9], 5.0)


def band(random: Random) -> np.ndarray:
    """Two instruments at once, at different levels."""
    players = random.permutation(np.array([guitar, bells, pad, organ, drums], dtype=object))[:2]
    first, second = (wave / max(np.abs(wave).max(), 1e-9) for wave in (player(random) for player in players))
    return first + random.uniform(0.2, 1.0) * second


def _slow(random: Random, seconds: float, rate: float) -> np.ndarray:
    """A random curve [N] between 0 and 1 that turns about `rate` times a second."""
    points = random.random(int(seconds * rate) + 3)
    return np.interp(times(seconds) * rate, np.arange(len(points)), points)


def _resonant(noise: np.ndarray, frequency: np.ndarray, width: float) -> np.ndarray:
    """Noise through one resonance [N] in Hz, of `width` in Hz: a complex oscillator that noise drives.

    Frames of 10 ms are long enough for resonances this wide to be filtered one by one, by overlapped addition.
    """
    frame, hop = 512, 256
    window = np.hanning(frame + 1)[:-1]
    bins = np.fft.rfftfreq(frame, 1 / SAMPLE_RATE)
    out = np.zeros(len(noise) + frame)
    padded = np.pad(noise, (0, frame))
    for start in range(0, len(noise), hop):
        gain = 1.0 / (1.0 + ((bins - frequency[start]) / width) ** 2)
        out[start : start + frame] += np.fft.irfft(np.fft.rfft(padded[start : start + frame] * window) * gain, frame)
    return out[: len(noise)]


def wind(random: Random) -> np.ndarray:
    noise = random.standard_normal(5 * SAMPLE_RATE)
    gust = _slow(random, 5.0, random.uniform(0.5, 2.0))
    return _resonant(noise, 150 + 900 * gust, random.uniform(60, 300)) * (0.2 + gust) ** 2


def rain(random: Random) -> np.ndarray:
    """Drops are short decaying clicks of random level and pitch over a hiss."""
    seconds, drops = 5.0, int(random.uniform(50, 600))
    t = times(0.02)
    events = []
    for start in random.uniform(0, seconds - 0.02, drops):
        drop = np.exp(-t * random.uniform(200, 900)) * np.sin(2 * np.pi * random.uniform(800, 7000) * t)
        events.append((start, drop * random.exponential()))
    return mix(events, seconds) + random.uniform(0.01, 0.2) * random.standard_normal(round(seconds * SAMPLE_RATE))


def engine(random: Random) -> np.ndarray:
    """Firing pulses whose rate wanders, each an exhaust's resonance, and some of them weaker than others."""
    rate = random.uniform(15, 90) * (0.7 + 0.6 * _slow(random, 5.0, random.uniform(0.3, 1.5)))
    phase = np.cumsum(rate) / SAMPLE_RATE
    wave = sum(random.uniform(0.2, 1.0) / k**0.7 * np.sin(2 * np.pi * k * phase / 2) for k in range(1, 40))
    return wave + random.uniform(0.05, 0.4) * random.standard_normal(len(wave)) * (phase % 1 < 0.3)


def siren(random: Random) -> np.ndarray:
    t = times(5.0)
    low, high = sorted(random.uniform(300, 2000, 2))
    swing = 0.5 + 0.5 * np.sin(2 * np.pi * random.uniform(0.3, 6.0) * t)
    phase = 2 * np.pi * np.cumsum(low + (high - low) * swing) / SAMPLE_RATE
    return np.sin(phase) + random.uniform(0, 0.6) * np.sin(2 * phase) + random.uniform(0, 0.4) * np.sin(3 * phase)


def bubbles(random: Random) -> np.ndarray:
    """Sines that rise as they fade (Minnaert 1933: a bubble's pitch is set by its size)."""
    events = []
    for start in random.uniform(0, 4.8, int(random.uniform(10, 90))):
        t = times(random.uniform(0.03, 0.2))
        first = random.uniform(300, 2500)
        phase = 2 * np.pi * (first * t + 0.5 * random.uniform(1, 8) * first * t**2)
        events.append((start, random.exponential() * np.exp(-t * 25) * np.sin(phase)))
    return mix(events, 5.0)


def crickets(random: Random) -> np.ndarray:
    t, wave = times(5.0), 0.0
    for _ in range(random.integers(1, 4)):
        chirp = np.sin(2 * np.pi * random.uniform(20, 60) * t).clip(0)
        chirp = chirp * (np.sin(2 * np.pi * random.uniform(0.8, 3) * t) > 0)
        wave = wave + random.uniform(0.2, 1.0) * chirp * np.sin(2 * np.pi * random.uniform(2500, 6500) * t)
    return wave + random.uniform(0.001, 0.05) * random.standard_normal(len(t))


def hum(random: Random) -> np.ndarray:
    t, base = times(5.0), random.choice((50.0, 60.0, 100.0, 120.0)) * random.uniform(0.97, 1.03)
    wave = sum(random.exponential() / k * np.sin(2 * np.pi * k * base * t + random.uniform(0, 6)) for k in range(1, 16))
    return wave * (0.6 + 0.4 * _slow(random, 5.0, 3.0)) + random.uniform(0.01, 0.2) * random.standard_normal(len(t))


def clock(random: Random) -> np.ndarray:
    t, gap = times(0.05), random.uniform(0.15, 0.6)
    ticks = [np.exp(-t * random.uniform(80, 300)) * np.sin(2 * np.pi * f * t) for f in random.uniform(700, 5000, 2)]
    events = [(start, ticks[i % 2]) for i, start in enumerate(np.arange(0, 4.9, gap))]
    return mix(events, 5.0) + random.uniform(0.001, 0.01) * random.standard_normal(5 * SAMPLE_RATE)


Maker = Callable[[Random], np.ndarray]
MUSIC: tuple[Maker, ...] = (guitar, bells, pad, organ, drums, band)
TEXTURES: tuple[Maker, ...] = (wind, rain, engine, siren, bubbles, crickets, hum, clock)


def render(maker: Maker, seed: int) -> np.ndarray:
    """Five seconds [N] by a maker of `MUSIC` or `TEXTURES`, with a peak between 0.1 and 0.9.

    With a microphone's hiss, 50 to 70 dB below full scale: no recording is as silent between its partials as a formula.
    """
    random = np.random.default_rng([seed, *maker.__name__.encode()])
    wave = maker(random)
    wave = wave * (random.uniform(0.1, 0.9) / max(np.abs(wave).max(), 1e-9))
    return wave + 10 ** random.uniform(-3.5, -2.5) * random.standard_normal(len(wave)).clip(-4, 4)


def write(out: Path, each: int, seed: int = 0) -> int:
    """Writes `each` renderings by every maker as 16-bit FLAC, ``out/music/...`` and ``out/textures/...``: how many."""
    jobs = [(label, maker, i) for label, makers in (("music", MUSIC), ("textures", TEXTURES)) for maker in makers
            for i in range(each)]  # fmt: skip
    for label, maker, i in tqdm(jobs, "computing", unit=" sounds", delay=2, mininterval=1, leave=False):
        place = out / label / "synthesis" / maker.__name__ / f"{i:03d}.flac"
        place.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(place, render(maker, seed * each + i), SAMPLE_RATE, subtype="PCM_16")
    return len(jobs)
