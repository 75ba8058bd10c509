"""The `aar` command. Anything wrong with what the user gave is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

import aar_kernels as ak

from .audio import (
    AUDIO_SUFFIXES,
    TOKEN_SUFFIX,
    Tokens,
    audio_info,
    check_suffix,
    is_token_file,
    load_tokens,
    read_audio,
    save_tokens,
    write_audio,
)
from .checkpoints import sat_from_published
from .errors import AarError, CheckpointError, TokenFileError
from .models import SAT

__all__ = ["main"]

_CHECKPOINT_SUFFIXES = (".pth", ".pt")

_EXAMPLES = """\
examples:
  aar reconstruct speech.mp3 heard.wav --model DIR                   through the tokens and back
  aar reconstruct speech.mp3 heard.wav --model DIR --scales 1,5,16   by 1, 5 and 16 scales
  aar encode recordings/ tokens/ --model sat.pth --overlap 0.05      a tree of recordings, mirrored
  aar decode tokens/ heard/ --model sat.pth                          and back, as wav
  aar info tokens/speech.aart                                        what the file holds
  aar demo                                                           train a small model and hear it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 where anything asked for could not be done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv).parse_args(argv)
    try:
        return args.run(args) or 0
    except (AarError, OSError) as error:
        _report(error)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "aar", description="Scale-level audio tokenizer.", epilog=_EXAMPLES, formatter_class=formatter
    )
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
        "aar reconstruct speech.mp3 heard.wav --model DIR --scales 1,5,9,13,16",
    )
    _add_paths(
        command,
        f"recording or directory tree ({suffixes})",
        f"file ({suffixes}) or directory to mirror IN in",
    )
    _add_running_model(command)
    _add_overlap(command)
    command.add_argument(
        "--scales",
        type=_integers,
        metavar="K,...",
        help="write one file per number, OUT.scalesK: what the K coarsest scales alone sound like",
    )
    command.set_defaults(run=_reconstruct)

    command = add(
        "encode",
        "turn recordings into token files",
        "aar encode recordings/ tokens/ --model DIR --overlap 0.05",
    )
    _add_paths(
        command,
        f"recording or directory tree ({suffixes})",
        f"file or directory to mirror IN in ({TOKEN_SUFFIX})",
    )
    _add_running_model(command)
    _add_overlap(command)
    command.set_defaults(run=_encode)

    command = add("decode", "turn token files into recordings", "aar decode tokens/ heard/ --model DIR")
    _add_paths(
        command,
        f"token file or directory tree ({TOKEN_SUFFIX})",
        f"file ({suffixes}) or directory to mirror IN in (.wav)",
    )
    _add_running_model(command)
    command.set_defaults(run=_decode)

    command = add("info", "say what a model, a token file or a recording holds", "aar info sat.pth")
    command.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="MODEL|TOKENS|AUDIO",
        help="what to describe (default: this installation)",
    )
    _add_lengths(command)
    command.set_defaults(run=_info)

    command = add(
        "demo", "train a small model on embedded clips, and let you hear it", "aar demo --save-model DIR"
    )
    if argv[:1] == ["demo"]:
        from . import demo

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


def _add_running_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        help="directory of SAT.save_pretrained (`aar demo --save-model DIR` makes one), or published .pth",
    )
    _add_lengths(parser)
    parser.add_argument("--device", help="where the model runs (default: cuda if there is one, else cpu)")


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        type=_integers,
        default=ak.ScaleSchedule.quadratic(16, 75).lengths,
        metavar="N,...",
        help="tokens of each scale of a published .pth (default: the published schedule, 1,2,4 ... 75)",
    )


def _integers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers, as 1,5,16 is")
    return tuple(map(int, parts))


def _reconstruct(args: argparse.Namespace) -> int:
    jobs = _plan(args.source, args.target, AUDIO_SUFFIXES, None)
    for job in jobs:
        check_suffix(job.target)
    model = _load_model(args)
    if args.scales and max(args.scales) > model.num_scales:
        raise AarError(f"--scales {max(args.scales)}: the model has {model.num_scales} scales")

    def work(job: Job, bar: tqdm) -> None:
        wav = _read(job.source, model)
        bar.total += 2 * model.windows(args.overlap).count(wav.shape[-1])
        codes = model.encode(wav, args.overlap, bar.update)
        if args.scales is None:
            out = model.decode(codes, wav.shape[-1], args.overlap, bar.update)
            return write_audio(job.target, out[0, 0], model.config.sample_rate)
        waves = model.decode_scales(codes, args.scales, wav.shape[-1], args.overlap, bar.update)
        for kept, out in zip(args.scales, waves, strict=True):
            target = job.target.with_name(f"{job.target.stem}.scales{kept:02d}{job.target.suffix}")
            write_audio(target, out[0, 0], model.config.sample_rate)

    return _run(jobs, work)


def _encode(args: argparse.Namespace) -> int:
    jobs = _plan(args.source, args.target, AUDIO_SUFFIXES, TOKEN_SUFFIX)
    model = _load_model(args)
    config, fingerprint = model.config, model.fingerprint()

    def work(job: Job, bar: tqdm) -> None:
        wav = _read(job.source, model)
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

    return _run(jobs, work)


def _decode(args: argparse.Namespace) -> int:
    jobs = _plan(args.source, args.target, (TOKEN_SUFFIX,), ".wav")
    for job in jobs:
        check_suffix(job.target)
    model = _load_model(args)
    config = model.config
    ours = model.fingerprint(), config.lengths, config.codebook_size, config.sample_rate

    def work(job: Job, bar: tqdm) -> None:
        tokens = load_tokens(job.source)
        if (tokens.model, tokens.lengths, tokens.codebook_size, tokens.sample_rate) != ours:
            raise TokenFileError(
                f"{job.source}: made by another model ({tokens.model}) than --model ({ours[0]}); give that"
            )
        bar.total += len(tokens.codes)
        codes = tokens.codes[None].to(_device(model))
        try:
            wav = model.decode(codes, tokens.num_samples, tokens.overlap, bar.update)
        except ValueError as error:
            raise TokenFileError(f"{job.source}: the token file does not fit the model: {error}") from None
        write_audio(job.target, wav[0, 0], tokens.sample_rate)

    return _run(jobs, work)


def _info(args: argparse.Namespace) -> int:
    if args.path is None:
        rows = {
            "torch": torch.__version__,
            "libsndfile": soundfile.__libsndfile_version__,
            "operators": "`python -m aar_kernels.info` lists them and what runs here",
            "models": "none ships with this version; `aar demo --save-model DIR` trains a small one",
        }
    elif args.path.is_dir() or args.path.suffix in _CHECKPOINT_SUFFIXES:
        try:
            rows = _describe_model(_open_model(args.path, args.lengths))
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


def _describe_model(model: SAT) -> dict[str, object]:
    config = model.config
    rate = config.sample_rate / config.window_samples * config.schedule.total
    return {
        "model": f"SAT, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
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


def _load_model(args: argparse.Namespace) -> SAT:
    if args.model is None:
        raise AarError(
            "--model is needed, since no trained model ships with this version: a SAT.save_pretrained "
            "directory or a published .pth; `aar demo --save-model DIR` trains a small one"
        )
    model = _open_model(args.model, args.lengths)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # For its error: what is wrong with the overlap is known before any work.
        model.windows(getattr(args, "overlap", 0.0))
        return model.to(device)
    except (ValueError, RuntimeError) as error:
        raise AarError(str(error).splitlines()[0]) from None


def _open_model(path: Path, lengths: Sequence[int]) -> SAT:
    try:
        return SAT.from_pretrained(path) if path.is_dir() else sat_from_published(path, lengths)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: no model has these sizes: {error}") from None


def _read(path: Path, model: SAT) -> torch.Tensor:
    return read_audio(path, model.config.sample_rate)[None, None].to(_device(model))


def _device(model: SAT) -> torch.device:
    return model.quantizer.codebooks.device


@dataclass(frozen=True)
class Job:
    """One file to make of another."""

    source: Path
    target: Path


def _plan(source: Path, target: Path, suffixes: Sequence[str], new_suffix: str | None) -> list[Job]:
    """What to make of `source`, a file or a tree; a tree's files keep their names, but for `new_suffix`.

    Raises:
        AarError: nothing to do, or outputs that would overwrite an input or each other.
    """

    def renamed(path: Path) -> Path:
        return path.with_suffix(new_suffix or path.suffix)

    if source.is_dir():
        if target.exists() and not target.is_dir():
            raise AarError(
                f"{target}: is a file, but {source} is a directory; name a directory to mirror it in"
            )
        files = sorted(
            path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
        )
        if not files:
            raise AarError(f"{source}: holds no file that ends in {', '.join(suffixes)}")
        jobs = [Job(path, target / renamed(path.relative_to(source))) for path in files]
    elif source.exists():
        jobs = [Job(source, target / renamed(Path(source.name)) if target.is_dir() else target)]
    else:
        raise AarError(f"{source}: no such file or directory")
    sources = {job.target: job.source for job in jobs}
    for job in jobs:
        if sources[job.target] != job.source:
            raise AarError(
                f"{job.source} and {sources[job.target]} would both become {job.target}; rename one"
            )
        if job.target.exists() and job.target.samefile(job.source):
            raise AarError(f"{job.target}: would overwrite the input; name another OUT")
    return jobs


def _run(jobs: Sequence[Job], work: Callable[[Job, tqdm], None]) -> int:
    """Does every job, whichever fail. The bar counts windows, as files are found to hold them."""
    errors = []
    # Work of less than two seconds needs no bar, and a log file no ten lines a second.
    interval = 0.1 if sys.stderr.isatty() else 10
    try:
        with tqdm(total=0, unit=" windows", delay=2, mininterval=interval, dynamic_ncols=True) as bar:
            for job in jobs:
                bar.set_description(job.source.name, refresh=False)
                try:
                    work(job, bar)
                except (AarError, OSError) as error:
                    errors.append(error)
    finally:
        # Below the bar, where they stay; and also after an interruption.
        for error in errors:
            _report(error)
    return 2 if errors else 0


def _report(error: Exception) -> None:
    """One line: a checkpoint's differences beyond the first are for `aar info` to list."""
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    else:
        message = str(error).splitlines()[0]
    print(f"aar: {message}", file=sys.stderr)
