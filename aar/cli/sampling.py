"""`aar sample`: new sounds from a transformer and its tokenizer."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch
from tqdm import tqdm

from ..audio import read_audio, write_audio
from ..conditions import CLAP_MODEL, AcousticEmbedding, Clap, ConditionError
from ..errors import AarError
from ..models import AAR, SAT
from ..models.pretrained import shipped
from .models import DEFAULT, add_lengths, open_model, open_transformer, to_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "float8": torch.float8_e4m3fn}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, metavar="OUT", help="directory for 000.wav, 001.wav, ...")
    parser.add_argument(
        "--model", type=Path, default=DEFAULT,
        help="directory of AAR.save_pretrained, or published .pth of an AAR (default: %(default)s, which ships)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path,
        help="the SAT it was trained on: directory or published .pth (default, for a model that ships: its own)",
    )  # fmt: skip
    add_lengths(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cond", type=Path, metavar="AUDIO", help="sounds like this recording, by the model's embedding")
    what.add_argument("--text", help="sounds like this description (by its CLAP embedding)")
    what.add_argument("--unconditional", action="store_true", help="any sound")
    parser.add_argument("--clap", default=CLAP_MODEL, metavar="DIR|NAME", help=f"CLAP model (default: {CLAP_MODEL})")
    parser.add_argument("--num", type=int, default=1, metavar="N", help="how many sounds (default: 1)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="length of each (default: 1); longer ones are windows side by side, "
        "each made by itself and cross-faded",
    )  # fmt: skip
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance at the last scale (default: 4)")
    parser.add_argument("--top-k", type=int, default=200, help="likeliest codes kept (default: 200; 0: all)")
    parser.add_argument("--top-p", type=float, default=0.95, help="their probability kept (default: 0.95)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest code (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sound; each other has the next (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--device", help="where the models run (default: cuda if there is one, else cpu)")
    parser.set_defaults(run=sample)


def sample(args: argparse.Namespace) -> None:
    if args.num < 1 or not args.seconds > 0:
        raise AarError(f"--num and --seconds must be positive, got {args.num} and {args.seconds:g}")
    if args.target.exists() and not args.target.is_dir():
        raise AarError(f"{args.target}: is a file; name a directory for the sounds")
    if args.tokenizer is None and str(args.model) not in shipped():
        raise AarError(f"--tokenizer is needed: the SAT that {args.model} was trained on")
    tokenizer = open_model(args.tokenizer or args.model, args.lengths)
    model = open_transformer(args.model, tokenizer)
    condition = _condition(args, model, tokenizer)
    tokenizer, model = to_device(tokenizer, args.device), to_device(model, args.device)

    rate = tokenizer.config.sample_rate
    samples = max(round(args.seconds * rate), 1)
    # Windows made apart meet in a cross-fade of a twentieth of a second.
    overlap = 0.0 if samples <= tokenizer.config.window_samples else 0.05 * tokenizer.config.window_samples / rate
    count = tokenizer.windows(overlap).count(samples)
    with tqdm(total=args.num, unit=" sounds", delay=2, dynamic_ncols=True) as bar:
        for i in range(args.num):
            codes = _codes(args, model, condition, count, first_seed=args.seed + i * count)
            wave = tokenizer.decode(codes[None], samples, overlap)[0, 0]
            write_audio(args.target / f"{i:03d}.wav", wave, rate)
            bar.update()


def _codes(args: argparse.Namespace, model: AAR, condition: torch.Tensor | None, count: int, first_seed: int):
    """``[windows, total]``."""
    given = {"num": count} if condition is None else {"condition": condition.to(model.position).expand(count, -1)}
    filters = {"cfg": args.cfg, "top_k": args.top_k, "top_p": args.top_p, "temperature": args.temperature}
    try:
        return model.sample(**given, **filters, seed=first_seed, dtype=DTYPES[args.dtype])
    except ValueError as error:
        raise AarError(str(error)) from None


def _condition(args: argparse.Namespace, model: AAR, tokenizer: SAT) -> torch.Tensor | None:
    """``[1, condition_dim]``, or None."""
    if args.unconditional:
        return None
    rate, width = tokenizer.config.sample_rate, model.config.condition_dim
    wav = None if args.cond is None else read_audio(args.cond, rate)
    if width == AcousticEmbedding.dim:
        if wav is None:
            raise ConditionError(f"{args.model} is conditioned on the acoustics of recordings; give one with --cond")
        return AcousticEmbedding(rate).embed_audio([wav], rate)
    with contextlib.suppress(ImportError):  # which Clap explains
        import transformers

        transformers.utils.logging.disable_progress_bar()
    clap = Clap.from_pretrained(args.clap)
    if clap.dim != width:
        raise ConditionError(f"{args.model} is conditioned on {width} numbers, {args.clap} gives {clap.dim}")
    return clap.embed_text([args.text]) if wav is None else clap.embed_audio([wav], rate)
