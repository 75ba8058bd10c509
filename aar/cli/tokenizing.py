"""`aar reconstruct`, `aar encode`, `aar decode`: recordings through the tokens and back."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ..audio import (
    AUDIO_SUFFIXES,
    TOKEN_SUFFIX,
    Tokens,
    check_suffix,
    load_tokens,
    read_audio,
    save_tokens,
    write_audio,
)
from ..errors import AarError, TokenFileError
from ..models import SAT
from .jobs import Job, plan, run
from .models import device_of, load_model


def reconstruct(args: argparse.Namespace) -> int:
    jobs = plan(args.source, args.target, AUDIO_SUFFIXES, None)
    for job in jobs:
        check_suffix(job.target)
    model = load_model(args)
    if args.scales and max(args.scales) > model.num_scales:
        raise AarError(f"--scales {max(args.scales)}: the model has {model.num_scales} scales")

    def work(job: Job, bar: tqdm) -> None:
        wav = read(job.source, model)
        bar.total += 2 * model.windows(args.overlap).count(wav.shape[-1])
        codes = model.encode(wav, args.overlap, bar.update)
        if args.scales is None:
            out = model.decode(codes, wav.shape[-1], args.overlap, bar.update)
            return write_audio(job.target, out[0, 0], model.config.sample_rate)
        waves = model.decode_scales(codes, args.scales, wav.shape[-1], args.overlap, bar.update)
        for kept, out in zip(args.scales, waves, strict=True):
            target = job.target.with_name(f"{job.target.stem}.scales{kept:02d}{job.target.suffix}")
            write_audio(target, out[0, 0], model.config.sample_rate)

    return run(jobs, work)


def encode(args: argparse.Namespace) -> int:
    jobs = plan(args.source, args.target, AUDIO_SUFFIXES, TOKEN_SUFFIX)
    model = load_model(args)
    config, fingerprint = model.config, model.fingerprint()

    def work(job: Job, bar: tqdm) -> None:
        wav = read(job.source, model)
        bar.total += model.windows(args.overlap).count(wav.shape[-1])
        codes = model.encode(wav, args.overlap, bar.update)
        tokens = Tokens(
            codes[0].cpu(),
            config.lengths,
            config.codebook_size,
            config.sample_rate,
            wav.shape[-1],
            args.overlap,
            fingerprint,
        )
        save_tokens(job.target, tokens)

    return run(jobs, work)


def decode(args: argparse.Namespace) -> int:
    jobs = plan(args.source, args.target, (TOKEN_SUFFIX,), ".wav")
    for job in jobs:
        check_suffix(job.target)
    model = load_model(args)
    config = model.config
    ours = model.fingerprint(), config.lengths, config.codebook_size, config.sample_rate

    def work(job: Job, bar: tqdm) -> None:
        tokens = load_tokens(job.source)
        if (tokens.model, tokens.lengths, tokens.codebook_size, tokens.sample_rate) != ours:
            raise TokenFileError(
                f"{job.source}: made by another model ({tokens.model}) than --model ({ours[0]}); give that"
            )
        bar.total += len(tokens.codes)
        codes = tokens.codes[None].to(device_of(model))
        try:
            wav = model.decode(codes, tokens.num_samples, tokens.overlap, bar.update)
        except ValueError as error:
            raise TokenFileError(f"{job.source}: the token file does not fit the model: {error}") from None
        write_audio(job.target, wav[0, 0], tokens.sample_rate)

    return run(jobs, work)


def read(path: Path, model: SAT) -> torch.Tensor:
    return read_audio(path, model.config.sample_rate)[None, None].to(device_of(model))
