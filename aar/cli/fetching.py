"""`aar data fetch`: free recordings to train on, and their licences on standard output."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.debian import NAMES, add_to_sources, fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    does = "get recordings out of Debian packages, without installing them"
    action = actions.add_parser(
        "fetch", help=does, description=f"{does[0].upper()}{does[1:]}, with their licences.",
        epilog="flite is speech made here; hedgewars-data, warzone2100-music and wesnoth-music are 100 to 150 MB each.",
    )  # fmt: skip
    action.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    action.add_argument("target", type=Path, metavar="OUT", help="folder: OUT/LABEL/PACKAGE/..., OUT/SOURCES.md")
    action.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    for name in dict.fromkeys(args.names):
        fetched = fetch(name, args.target)
        add_to_sources(args.target, fetched)
        print(fetched.licence.read_text(errors="replace"))
        counts = ", ".join(f"{count} {label}" for label, count in fetched.recordings.items())
        print(f"{fetched.package} {fetched.version}: {counts}; the licences above are in {fetched.licence}")
