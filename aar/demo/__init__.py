"""`aar demo`: trains a small SAT on the embedded clips, and makes a page on which to hear its scales."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..atomic import replacing
from ..models import SAT, SATConfig
from . import comparison, page
from .listening import Listening
from .recordings import CLIPS, load
from .training import train

__all__ = ["add_arguments", "run", "run_from_args"]

CONFIG = SATConfig(
    n_filters=8,
    dim=128,
    latent_dim=64,
    # In so short a training it learnt faster than the published gradient at every scale.
    straight_through="once",
    # The published 0.99 remembers a hundred steps; here the encoder is another one long before that.
    codebook_decay=0.95,
    # Lets a code go 45 steps after its last hit. The default is for large batches: four windows hit a code of the
    # first scale every 256 steps, and it would replace nearly all of them at every step.
    dead_code_threshold=0.005,
)
TITLE = "Next-scale audio tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `aar demo`."""
    parser.add_argument(
        "out",
        nargs="?",
        default="demo_output",
        metavar="DIR",
        help="where index.html, sounds and pictures go (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=_positive(float),
        default=3.0,
        metavar="M",
        help="how long to train (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=_positive(int),
        metavar="N",
        help="how many steps to train, instead of minutes: then a seed always gives the same model",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and crops (default: 0)")
    parser.add_argument(
        "--save-model", metavar="DIR", help="keep the model, for `--model DIR` of other commands"
    )
    parser.add_argument(
        "--clips",
        metavar="DIR",
        help="use the recordings there, named KIND_NAME, instead of the embedded ones",
    )


def run_from_args(args: argparse.Namespace) -> None:
    """`run` with what `add_arguments` declared."""
    run(
        args.out,
        minutes=args.minutes,
        steps=args.steps,
        seed=args.seed,
        save_model=args.save_model,
        clips_dir=args.clips,
    )


def run(
    out_dir: str | os.PathLike,
    *,
    minutes: float = 3.0,
    steps: int | None = None,
    seed: int = 0,
    save_model: str | os.PathLike | None = None,
    clips_dir: str | os.PathLike | None = None,
) -> Path:
    """Trains, reconstructs, times the quantizer, and writes a page; returns the path of its index.html.

    Args:
        minutes: of training, unless `steps` is given; only then does the seed alone decide the model.
        save_model: directory for `SAT.save_pretrained`.
        clips_dir: recordings named KIND_NAME to train on and to show; the embedded ones if None.

    Raises:
        AudioError: there are no recordings in `clips_dir`, or one cannot be used.
        OSError: something cannot be read or written.
    """
    recordings = load(Path(clips_dir or CLIPS), CONFIG.sample_rate)
    seconds = sum(len(recording.wave) for recording in recordings) / CONFIG.sample_rate
    print(f"{len(recordings)} recordings of together {seconds:.0f} s, {torch.get_num_threads()} threads")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sat = SAT(CONFIG)
        waves = [recording.wave for recording in recordings]
        losses = train(sat, waves, minutes=minutes, steps=steps, seed=seed)
    if save_model:
        sat.save_pretrained(save_model)
        print(f"model saved in {save_model}")

    index = Path(out_dir) / "index.html"
    listening = Listening(sat, index.parent)
    clips = [listening.show(recording) for recording in recordings]
    tables = [listening.table(), comparison.table(sat, torch.cat(waves))]
    for table in tables:
        print(f"\n{table.text()}")
    with replacing(index) as path:
        path.write_text(page.render(TITLE, _introduction(sat, losses, seconds), tables, clips), "utf-8")
    print(f"\nlisten: {index.resolve().as_uri()}")
    return index


def _introduction(sat: SAT, losses: Sequence[float], seconds: float) -> list[str]:
    parameters = sum(parameter.numel() for parameter in sat.parameters())
    last = losses[-20:]
    return [
        f"Each second of sound is {sat.config.schedule.total} tokens in {sat.num_scales} scales, from one "
        f"token that holds for the whole second to {sat.config.lengths[-1]} of them. Below is every clip as "
        "recorded, and as it sounds when only its coarsest scales are decoded: the more, the nearer.",
        f"The model has {parameters / 1e6:.1f} million parameters and was trained from nothing for "
        f"{len(losses)} steps on these very {seconds:.0f} seconds, to a loss of {sum(last) / len(last):.1f}. "
        "It shows what scales do, not how a tokenizer sounds that has heard more of the world for longer.",
    ]


def _positive(number: type):
    def parse(text: str):
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
        return value

    parse.__name__ = number.__name__
    return parse
