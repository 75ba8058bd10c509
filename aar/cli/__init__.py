"""The `aar` command. Anything wrong with what the user gave is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..audio import AUDIO_SUFFIXES, TOKEN_SUFFIX
from ..errors import AarError
from . import describing, evaluating, fetching, sampling, tokenizing, training
from .jobs import report
from .models import add_lengths, add_running_model, integers

__all__ = ["main"]

_EXAMPLES = """\
examples:
  aar reconstruct speech.mp3 heard.wav                               through the tokens and back
  aar reconstruct speech.mp3 heard.wav --scales 1,5,16               by 1, 5 and 16 scales
  aar encode recordings/ tokens/ --model sat.pth --overlap 0.05      a tree of recordings, mirrored
  aar decode tokens/ heard/ --model sat.pth                          and back, as wav
  aar sample made/ --cond speech.mp3 --num 4                         new sounds like that one
  aar sample made/ --model aar.pth --tokenizer sat.pth --text "rain on a roof"   or like a description
  aar train-sat configs/small-sat.yaml data.source=recordings/ --out runs/sat    a tokenizer of your own
  aar info tokens/speech.aart                                        what the file holds
  aar data fetch freedoom flite sounds/                              recordings to train on, out of Debian packages
  aar evaluate sounds/ --aar small --json metrics.json               distances per scale, use of codes
  aar demo                                                           a page of sounds that the small models make
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 where anything asked for could not be done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parsed(argv)
    try:
        return args.run(args) or 0
    except (AarError, OSError) as error:
        report(error)
        return 2
    except KeyboardInterrupt:
        return 130


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(each.startswith("-") for each in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # KEY=VALUE behind an option: argparse takes for one list only what stands together
        args.overrides = [*args.overrides, *rest]
    return args


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    about = "Scale-level audio tokenizer and next-scale transformer."
    parser = argparse.ArgumentParser("aar", description=about, epilog=_EXAMPLES, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, does: str, example: str) -> argparse.ArgumentParser:
        description = f"{does[0].upper()}{does[1:]}."
        epilog = f"example:\n  {example}"
        return commands.add_parser(
            name, help=does, description=description, epilog=epilog, formatter_class=formatter
        )

    suffixes = ", ".join(AUDIO_SUFFIXES)
    command = add(
        "reconstruct",
        "send recordings through the tokens and back",
        "aar reconstruct speech.mp3 heard.wav --scales 1,5,9,13,16",
    )
    _add_paths(
        command,
        f"recording or directory tree ({suffixes})",
        f"file ({suffixes}) or directory to mirror IN in",
    )
    add_running_model(command)
    _add_overlap(command)
    command.add_argument(
        "--scales",
        type=integers,
        metavar="K,...",
        help="write one file per number, OUT.scalesK: what the K coarsest scales alone sound like",
    )
    command.set_defaults(run=tokenizing.reconstruct)

    command = add(
        "encode",
        "turn recordings into token files",
        "aar encode recordings/ tokens/ --overlap 0.05",
    )
    _add_paths(
        command,
        f"recording or directory tree ({suffixes})",
        f"file or directory to mirror IN in ({TOKEN_SUFFIX})",
    )
    add_running_model(command)
    _add_overlap(command)
    command.set_defaults(run=tokenizing.encode)

    command = add("decode", "turn token files into recordings", "aar decode tokens/ heard/")
    _add_paths(
        command,
        f"token file or directory tree ({TOKEN_SUFFIX})",
        f"file ({suffixes}) or directory to mirror IN in (.wav)",
    )
    add_running_model(command)
    command.set_defaults(run=tokenizing.decode)

    command = add("info", "say what a model, a token file or a recording holds", "aar info small")
    command.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="MODEL|TOKENS|AUDIO",
        help="what to describe (default: this installation)",
    )
    add_lengths(command)
    command.set_defaults(run=describing.info)

    example = 'aar sample made/ --model aar.pth --tokenizer sat.pth --text "rain on a roof" --num 4'
    sampling.add_arguments(add("sample", "make new sounds", example))

    example = "aar evaluate recordings/ --aar small --json metrics.json"
    evaluating.add_arguments(add("evaluate", "measure reconstructions, codebooks and predictions", example))

    fetching.add_arguments(add("data", "get or make recordings to train on", "aar data fetch freedoom flite sounds/"))

    example = "aar train-sat configs/small-sat.yaml data.source=recordings/ --out runs/sat"
    training.add_arguments(add("train-sat", "train a tokenizer", example), "sat")
    example = "aar tokenize recordings/ tokens/ --model runs/sat/model"
    training.add_tokenize_arguments(add("tokenize", "make tokens to train a transformer on", example))
    example = "aar train-aar configs/small-aar.yaml tokens=tokens/ --out runs/aar"
    training.add_arguments(add("train-aar", "train a transformer on a tokenizer's tokens", example), "aar")

    command = add(
        "demo", "train a small model on embedded clips, and let you hear it", "aar demo --save-model DIR"
    )
    if argv[:1] == ["demo"]:
        from .. import demo

        demo.add_arguments(command)
        command.set_defaults(run=demo.run_from_args)
    return parser


def _add_paths(parser: argparse.ArgumentParser, source: str, target: str) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help=source)
    parser.add_argument("target", type=Path, metavar="OUT", help=target)


def _add_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds that neighbouring windows share and are cross-faded over, so that no seam is heard "
        "(default 0: fewest tokens)",
    )
