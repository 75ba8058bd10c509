"""Music-like clips of the demo, computed from formulas alone: no licence to ask for, and the same everywhere.

    python -m aar.demo.synthesize DIR      # writes DIR/music_*.flac, as committed in aar/demo/clips

Every function here returns a float64 wave [N] at `SAMPLE_RATE`; noise comes from fixed seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 24_000
PEAK = 0.7


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


def guitar() -> np.ndarray:
    """An arpeggio of A minor and F major on plucked strings."""
    notes = [45, 52, 57, 60, 64, 60, 57, 52, 41, 48, 53, 57, 60, 57, 53, 48]
    return mix([(0.2 * i, plucked_string(note, 1.6, seed=i)) for i, note in enumerate(notes)], 4.0)


def bells() -> np.ndarray:
    """A falling pentatonic phrase of bells."""
    notes = [84, 79, 76, 74, 72, 67]
    return mix([(0.45 * i, fm_bell(note, 2.0)) for i, note in enumerate(notes)], 3.6)


def pad() -> np.ndarray:
    """Two slow chords, D minor ninth to G major."""
    chords = [(0.0, (50, 57, 60, 64, 65)), (1.75, (43, 55, 59, 62, 67))]
    return mix([(start, pad_note(note, 2.2)) for start, chord in chords for note in chord], 4.0)


def drums() -> np.ndarray:
    """One bar and a half of a rock beat at 120 to the minute."""
    beat = 0.5
    events = [(i * beat / 2, hi_hat(seed=i)) for i in range(12)]
    events += [(i * beat, kick()) for i in (0, 2, 2.5, 4)]
    events += [(i * beat, snare(seed=100 + i)) for i in (1, 3, 5)]
    return mix(events, 3.2)


def organ() -> np.ndarray:
    """A short melody of drawbar tones: a few exact harmonics with vibrato, over a held fifth."""
    drawbars = {0.5: 0.6, 1: 1.0, 1.5: 0.5, 2: 0.7, 3: 0.3, 4: 0.35, 8: 0.15}

    def tone(midi: float, seconds: float) -> np.ndarray:
        t = times(seconds)
        phase = 2 * np.pi * pitch(midi) * t + 0.05 * np.sin(2 * np.pi * 6.0 * t)
        wave = sum(level * np.sin(k * phase) for k, level in drawbars.items())
        return wave * np.minimum(1.0, np.minimum(t, seconds - t) / 0.015)

    melody = [(0.0, 64, 0.4), (0.4, 67, 0.4), (0.8, 72, 0.8), (1.6, 71, 0.4), (2.0, 67, 0.4), (2.4, 69, 1.2)]
    held = [(0.0, 0.4 * tone(48, 3.6)), (0.0, 0.3 * tone(55, 3.6))]
    return mix([(start, tone(note, length)) for start, note, length in melody] + held, 3.7)


SOUNDS = {"guitar": guitar, "bells": bells, "pad": pad, "drums": drums, "organ": organ}


def render(name: str) -> np.ndarray:
    """The clip of that name [N], scaled to the common peak."""
    wave = SOUNDS[name]()
    return wave * (PEAK / np.abs(wave).max())


def main(directory: str) -> None:
    """Write every sound as 16-bit FLAC."""
    for name in SOUNDS:
        path = Path(directory) / f"music_{name}.flac"
        soundfile.write(path, render(name), SAMPLE_RATE, subtype="PCM_16")


if __name__ == "__main__":
    main(*sys.argv[1:])
