"""`aar info`: what a model, a token file or a recording holds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import soundfile
import torch
from torch import nn

from ..audio import Tokens, audio_info, is_token_file, load_tokens
from ..checkpoints import SUFFIXES
from ..errors import CheckpointError
from ..models import AAR, SAT
from ..models.pretrained import CONFIG_FILE, SHIPPED, shipped
from .models import open_model


def info(args: argparse.Namespace) -> int:
    if args.path is None:
        rows = {
            "torch": torch.__version__,
            "libsndfile": soundfile.__libsndfile_version__,
            "operators": "`python -m aar_kernels.info` lists them and what runs here",
            "models": f"{', '.join(shipped())}; `aar info NAME` describes one",
        }
    elif SAT.find(args.path).is_dir() or args.path.suffix in SUFFIXES:
        try:
            rows = _describe(args)
        except CheckpointError as error:
            # The one place that lists all: who asks here wants to know what the checkpoint lacks.
            print(f"aar: {error}", file=sys.stderr)
            return 2
    elif is_token_file(args.path):
        rows = _describe_tokens(load_tokens(args.path), args.path)
    else:
        rate, channels, samples, kind = audio_info(args.path)
        rows = {"recording": kind, "sample rate": f"{rate} Hz", "channels": channels}
        rows["duration"] = f"{samples / rate:.3f} s"
    for key, value in rows.items():
        print(f"{key:<14}{value}")
    return 0


def _describe(args: argparse.Namespace) -> dict[str, object]:
    """A shipped model is both; a directory is one, as its configuration tells."""
    if str(args.path) in shipped() and not args.path.is_dir():
        card = {"model card": SHIPPED / args.path / "README.md"}
        return _describe_tokenizer(SAT.from_pretrained(args.path)) | _describe_transformer(args.path) | card
    config = args.path / CONFIG_FILE
    if config.is_file() and "depth" in json.loads(config.read_text()):
        return _describe_transformer(args.path)
    return _describe_tokenizer(open_model(args.path, args.lengths))


def _describe_transformer(path: Path) -> dict[str, object]:
    model = AAR.from_pretrained(path)
    config = model.config
    return {
        "transformer": f"AAR, {_millions(model)} M parameters",
        "blocks": f"{config.depth} of width {config.width}, {config.heads} heads",
        "condition": f"{config.condition_dim} numbers",
    }


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"


def _describe_tokenizer(model: SAT) -> dict[str, object]:
    config = model.config
    rate = config.sample_rate / config.window_samples * config.schedule.total
    return {
        "model": f"SAT, {_millions(model)} M parameters",
        "sample rate": f"{config.sample_rate} Hz",
        "window": f"{config.window_samples} samples",
        "scales": f"{model.num_scales} ({', '.join(map(str, config.lengths))})",
        "tokens": f"{rate:.0f} a second, of {config.codebook_size} codes",
        "latent": f"{config.latent_dim} of {config.dim} channels",
        "fingerprint": model.fingerprint(),
    }


def _describe_tokens(tokens: Tokens, path: Path) -> dict[str, object]:
    seconds = tokens.num_samples / tokens.sample_rate
    return {
        "tokens": f"{tokens.codes.numel()} in {len(tokens.codes)} windows, of {tokens.codebook_size} codes",
        "duration": f"{seconds:.3f} s at {tokens.sample_rate} Hz",
        "scales": f"{len(tokens.lengths)} ({', '.join(map(str, tokens.lengths))})",
        "overlap": f"{tokens.overlap:g} s",
        "bit rate": f"{path.stat().st_size * 8 / seconds:.0f} bit/s",
        "model": tokens.model,
    }
