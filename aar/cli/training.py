"""`aar train-sat`, `aar train-aar`, `aar tokenize`: all run alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from ..conditions import CLAP_MODEL
from ..data import find_audio
from ..errors import AarError
from .models import add_running_model, load_model


def add_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Of `aar train-sat` or `aar train-aar`, by `kind` "sat" or "aar"."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings in place of the file's, as data.batch_size=8"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the run is kept")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.set_defaults(run=train, kind=kind)


def train(args: argparse.Namespace) -> None:
    # Not above: other commands should not wait for what only training needs.
    from ..training.aar import AARTask
    from ..training.config import AARTraining, SATTraining, read_config
    from ..training.loop import Trainer
    from ..training.sat import SATTask
    from ..training.world import joined

    logging.basicConfig(format="aar: %(message)s")
    config_class, task_class = {"sat": (SATTraining, SATTask), "aar": (AARTraining, AARTask)}[args.kind]
    config = read_config(config_class, args.config, args.overrides)
    with joined(args.device) as world:
        task = task_class(config, world)
        trainer = Trainer(task, config, args.out, world)
        if args.resume:
            if not trainer.resume() and world.rank == 0:
                print(f"aar: {args.out}: no checkpoint yet, beginning anew", file=sys.stderr)
        elif trainer.checkpoints.paths():
            raise AarError(f"{args.out}: holds checkpoints; --resume goes on from them, or name another --out")
        trainer.run()


def add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="recordings: folder, list, manifest or shard")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of tokens; one that was begun is gone on with")
    add_running_model(parser)
    parser.add_argument(
        "--condition", choices=("acoustic", "clap", "none"), default="acoustic", help="kept beside the tokens of each "
        "window (default: acoustic)",
    )  # fmt: skip
    parser.add_argument("--clap", default=CLAP_MODEL, metavar="DIR|NAME", help=f"CLAP model (default: {CLAP_MODEL})")
    parser.add_argument(
        "--overlap", type=float, default=0.0, metavar="S", help="seconds that neighbouring windows share: more "
        "windows of the same recordings (default: 0)",
    )  # fmt: skip
    parser.add_argument("--per-shard", type=int, default=100, metavar="N", help="recordings per file (default: 100)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that decode ahead (default: 2)")
    parser.set_defaults(run=tokenize)


def tokenize(args: argparse.Namespace) -> None:
    from ..training.tokens import tokenize
    from ..training.world import joined

    for option, value in (("--per-shard", args.per_shard), ("--workers", args.workers)):
        if value < 1:
            raise AarError(f"{option} must be at least 1, got {value}")
    logging.basicConfig(format="aar: %(message)s")
    with joined(args.device) as world:
        args.device = str(world.device)
        sat = load_model(args)
        total = len(find_audio(args.data)) // world.size
        with tqdm(total=total, unit=" recordings", delay=2, dynamic_ncols=True, disable=world.rank > 0) as bar:
            names = ("condition", "clap", "overlap", "per_shard", "workers")
            options = {name: getattr(args, name) for name in names}
            tokenize(args.data, args.out, sat, world, **options, progress=bar.update)
