"""`aar demo`: a page on which to hear what the small models make of recordings, and how fast the fast path is here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from ..atomic import replacing
from ..errors import AarError
from ..models import AAR, SAT
from . import comparison, page
from .gallery import Gallery
from .listening import Listening
from .making import Making
from .recordings import CLIPS, load

__all__ = ["add_arguments", "run", "run_from_args"]

TITLE = "Next-scale audio"
MODEL = "small"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `aar demo`."""
    parser.add_argument(
        "out", nargs="?", default="demo_output", metavar="DIR",
        help="where index.html, sounds and pictures go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--clips", metavar="DIR", help="show the recordings there, named KIND_NAME, instead of the embedded ones"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is made (default: 0)")


def run_from_args(args: argparse.Namespace) -> None:
    """`run` with what `add_arguments` declared."""
    run(args.out, clips_dir=args.clips, seed=args.seed)


def run(out_dir: str | os.PathLike, *, clips_dir: str | os.PathLike | None = None, seed: int = 0) -> Path:
    """Reconstructs and generates, times both, and writes a page; returns the path of its index.html.

    Args:
        clips_dir: recordings named KIND_NAME to show; the embedded ones if None.
        seed: of the generated sounds.

    Raises:
        AarError: there are no recordings in `clips_dir`, or one cannot be used; a negative seed.
        OSError: something cannot be read or written.
    """
    if seed < 0:
        raise AarError(f"--seed must not be negative, got {seed}")
    sat, aar = SAT.from_pretrained(MODEL), AAR.from_pretrained(MODEL)
    recordings = load(Path(clips_dir or CLIPS), sat.config.sample_rate)
    seconds = sum(len(recording.wave) for recording in recordings) / sat.config.sample_rate
    print(f"{len(recordings)} recordings of together {seconds:.0f} s, {torch.get_num_threads()} threads", flush=True)

    index = Path(out_dir) / "index.html"
    gallery = Gallery(index.parent, sat.config.sample_rate)
    listening, making = Listening(sat, gallery), Making(sat, aar, gallery, seed)
    heard = [listening.show(recording) for recording in recordings]
    made = [making.show(recording) for recording in recordings]
    sections = [
        page.Section(
            "Reconstructed",
            "The same tokens decoded from their coarsest scales alone: the more of them, the nearer to the source.",
            heard,
        ),
        page.Section(
            "Generated like a recording",
            "Each second is made anew from 192 statistics of the source's spectrum: its colour and how it moves, no "
            "words and no melody.",
            made,
        ),
        page.Section("Generated from nothing", "A second each, without any condition.", [making.unconditional()]),
    ]
    wave = torch.cat([recording.wave for recording in recordings])
    tables = [listening.table(), comparison.quantizer_table(sat, wave)]
    tables.append(comparison.generation_table(aar, making.conditions(wave)[:1]))
    for table in tables:
        print(f"\n{table.text()}")
    with replacing(index) as path:
        path.write_text(page.render(TITLE, _introduction(sat, aar), tables, sections), "utf-8")
    print(f"\nlisten: {index.resolve().as_uri()}")
    return index


def _introduction(sat: SAT, aar: AAR) -> list[str]:
    tokenizer, transformer = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (sat, aar))
    config = sat.config
    return [
        f"Each second of sound is {config.schedule.total} tokens in {sat.num_scales} scales, from one token that holds "
        f"for the whole second to {config.lengths[-1]} of them; a transformer writes all tokens of a scale at once, "
        f"coarse to fine, in {sat.num_scales} steps.",
        f"The tokenizer has {tokenizer:.1f} million parameters and the transformer {transformer:.1f}. Both were "
        "trained on a CPU within two hours, on two hours of synthetic speech, game effects and computed music: they "
        "show how the system works, not how good it can sound. No clip on this page was trained on.",
    ]
