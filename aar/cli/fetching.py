"""`aar data fetch`: free recordings to train on, and their licences on standard output; `aar data synthesize`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.debian import NAMES, add_to_sources, fetch
from ..data.synthesis import MUSIC, TEXTURES, write
from ..errors import AarError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    does = "get recordings out of Debian packages, without installing them"
    action = actions.add_parser(
        "fetch", help=does, description=f"{does[0].upper()}{does[1:]}, with their licences.",
        epilog="flite is speech made here; hedgewars-data, warzone2100-music and wesnoth-music are 100 to 150 MB each.",
    )  # fmt: skip
    action.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    action.add_argument("target", type=Path, metavar="OUT", help="folder: OUT/LABEL/PACKAGE/..., OUT/SOURCES.md")
    action.set_defaults(run=fetch_all)
    does = "compute music and textures from formulas, which ask for no licence"
    action = actions.add_parser(
        "synthesize", help=does, description=f"{does[0].upper()}{does[1:]}.",
        epilog=f"music: {_names(MUSIC)}; textures: {_names(TEXTURES)}; five seconds each",
    )  # fmt: skip
    action.add_argument("target", type=Path, metavar="OUT", help="folder: OUT/music/..., OUT/textures/...")
    action.add_argument("--each", type=int, default=40, metavar="N", help="of each kind (default: 40)")
    action.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other sounds (default: 0)")
    action.set_defaults(run=synthesize)


def synthesize(args: argparse.Namespace) -> None:
    if args.each < 1 or args.seed < 0:
        raise AarError(f"--each must be positive and --seed not negative, got {args.each} and {args.seed}")
    print(f"{write(args.target, args.each, args.seed)} sounds")


def _names(makers) -> str:
    return ", ".join(maker.__name__ for maker in makers)


def fetch_all(args: argparse.Namespace) -> None:
    for name in dict.fromkeys(args.names):
        fetched = fetch(name, args.target)
        add_to_sources(args.target, fetched)
        print(fetched.licence.read_text(errors="replace"))
        counts = ", ".join(f"{count} {label}" for label, count in fetched.recordings.items())
        print(f"{fetched.package} {fetched.version}: {counts}; the licences above are in {fetched.licence}")
