"""The options that name models, and loading them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

import aar_kernels as ak

from ..checkpoints import SUFFIXES, aar_from_published, sat_from_published
from ..errors import AarError, CheckpointError
from ..models import AAR, SAT

DEFAULT = Path("small")
"""The model that ships."""

Model = TypeVar("Model", SAT, AAR)


def add_running_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=DEFAULT,
        help="directory of SAT.save_pretrained, or published .pth (default: %(default)s, which ships with this)",
    )
    add_lengths(parser)
    parser.add_argument("--device", help="where the model runs (default: cuda if there is one, else cpu)")


def add_lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        type=integers,
        default=ak.ScaleSchedule.quadratic(16, 75).lengths,
        metavar="N,...",
        help="tokens of each scale of a published .pth (default: the published schedule, 1,2,4 ... 75)",
    )


def integers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers, as 1,5,16 is")
    return tuple(map(int, parts))


def load_model(args: argparse.Namespace) -> SAT:
    model = open_model(args.model, args.lengths)
    try:
        # For its error: what is wrong with the overlap is known before any work.
        model.windows(getattr(args, "overlap", 0.0))
    except ValueError as error:
        raise AarError(str(error)) from None
    return to_device(model, args.device)


def to_device(model: Model, device: str | None) -> Model:
    """The model where `--device` says."""
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise AarError(str(error).splitlines()[0]) from None


def open_model(path: Path, lengths: Sequence[int]) -> SAT:
    try:
        return sat_from_published(path, lengths) if path.suffix in SUFFIXES else SAT.from_pretrained(path)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: no model has these sizes: {error}") from None


def open_transformer(path: Path, tokenizer: SAT) -> AAR:
    """The transformer in a directory or published .pth, on the tokenizer's codebooks."""
    try:
        if path.suffix in SUFFIXES:
            return aar_from_published(path, tokenizer)
        model = AAR.from_pretrained(path)
        codebooks = model.quantizer.codebooks
        model.set_quantizer(tokenizer.quantizer)
        if not torch.equal(codebooks, model.quantizer.codebooks):
            raise CheckpointError(f"{path}: was trained on another tokenizer than this one")
        return model
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def device_of(model: SAT) -> torch.device:
    return model.quantizer.codebooks.device
