"""Music-like clips of the demo, computed from formulas alone: no licence to ask for, and the same everywhere.

    python -m aar.demo.synthesize DIR      # writes DIR/music_*.flac, as committed in aar/demo/clips

Every function here returns a float64 wave [N] at `SAMPLE_RATE`; noise comes from fixed seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile

from ..data.instruments import (
    SAMPLE_RATE,
    fm_bell,
    hi_hat,
    kick,
    mix,
    organ_tone,
    pad_note,
    plucked_string,
    snare,
)  # fmt: skip

PEAK = 0.7


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
    melody = [(0.0, 64, 0.4), (0.4, 67, 0.4), (0.8, 72, 0.8), (1.6, 71, 0.4), (2.0, 67, 0.4), (2.4, 69, 1.2)]
    held = [(0.0, 0.4 * organ_tone(48, 3.6)), (0.0, 0.3 * organ_tone(55, 3.6))]
    return mix([(start, organ_tone(note, length)) for start, note, length in melody] + held, 3.7)


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
