"""Instruments computed from formulas: waves that nobody's licence covers, and the same on every machine.

Every function returns a float64 wave [N] at `SAMPLE_RATE`; noise comes from the seed given. Pitches are MIDI note
numbers.
"""

from __future__ import annotations

import numpy as np

SAMPLE_RATE = 24_000


def pitch(midi: float) -> float:
    """Frequency in Hz of a MIDI note number (69 is the A of 440 Hz)."""
    return 440.0 * 2.0 ** ((midi - 69.0) / 12.0)


def times(seconds: float) -> np.ndarray:
    """Sample times [N] in seconds."""
    return np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def mix(events: list[tuple[float, np.ndarray]], seconds: float) -> np.ndarray:
    """Sum of waves, each from its time in seconds on; what lies beyond the end is cut with a short fade."""
    out = np.zeros(round(seconds * SAMPLE_RATE))
    for start, wave in events:
        first = round(start * SAMPLE_RATE)
        piece = wave[: len(out) - first]
        out[first : first + len(piece)] += piece
    fade = round(0.03 * SAMPLE_RATE)
    out[-fade:] *= np.linspace(1.0, 0.0, fade)
    return out


def plucked_string(midi: float, seconds: float, seed: int, damping: float = 0.996) -> np.ndarray:
    """Karplus and Strong (1983): a burst of noise circulates through a delay line with a two-point mean.

    The mean delays by half a sample, which the length of the line allows for.
    """
    period = round(SAMPLE_RATE / pitch(midi) - 0.5)
    line = np.random.default_rng(seed).uniform(-1.0, 1.0, period)
    turns = []
    for _ in range(round(seconds * SAMPLE_RATE) // period + 1):
        turns.append(line)
        line = damping * 0.5 * (line + np.roll(line, 1))
    return np.concatenate(turns)


def fm_bell(midi: float, seconds: float, ratio: float = 1.4, index: float = 6.0) -> np.ndarray:
    """Chowning (1973): an inharmonic modulator, whose index decays together with the loudness."""
    t, frequency = times(seconds), pitch(midi)
    envelope = np.exp(-2.2 * t)
    modulator = index * envelope * np.sin(2 * np.pi * frequency * ratio * t)
    return envelope * np.sin(2 * np.pi * frequency * t + modulator)


def pad_note(midi: float, seconds: float, partials: int = 12) -> np.ndarray:
    """Three detuned band-limited saw waves whose upper partials open slowly and close again."""
    t = times(seconds)
    wave = np.zeros_like(t)
    for detune in (-0.06, 0.0, 0.07):
        for k in range(1, partials + 1):
            brightness = np.exp(-0.25 * (k - 1) * (1.2 - np.sin(np.pi * t / seconds)))
            wave += brightness / k * np.sin(2 * np.pi * k * pitch(midi + detune) * t + 1.7 * k * detune)
    return wave * np.minimum(1.0, np.minimum(t, seconds - t) / 0.25)


def kick() -> np.ndarray:
    """A sine that falls from 160 to 50 Hz."""
    t = times(0.35)
    phase = 2 * np.pi * (50.0 * t + 110.0 / 30.0 * (1.0 - np.exp(-30.0 * t)))
    return np.exp(-9.0 * t) * np.sin(phase)


def snare(seed: int) -> np.ndarray:
    """Noise over a short 190 Hz tone."""
    t = times(0.22)
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return 0.35 * np.exp(-18.0 * t) * noise + 0.5 * np.exp(-25.0 * t) * np.sin(2 * np.pi * 190.0 * t)


def hi_hat(seed: int) -> np.ndarray:
    """Twice differenced noise, so that only the top of the band remains."""
    t = times(0.07)
    noise = np.diff(np.random.default_rng(seed).standard_normal(len(t) + 2), n=2)
    return 0.12 * np.exp(-60.0 * t) * noise


def organ_tone(midi: float, seconds: float) -> np.ndarray:
    """Drawbars: a few exact harmonics of one vibrato."""
    drawbars = {0.5: 0.6, 1: 1.0, 1.5: 0.5, 2: 0.7, 3: 0.3, 4: 0.35, 8: 0.15}
    t = times(seconds)
    phase = 2 * np.pi * pitch(midi) * t + 0.05 * np.sin(2 * np.pi * 6.0 * t)
    wave = sum(level * np.sin(k * phase) for k, level in drawbars.items())
    return wave * np.minimum(1.0, np.minimum(t, seconds - t) / 0.015)
