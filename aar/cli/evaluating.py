"""`aar evaluate`: what a tokenizer loses at each scale, how it uses its codes, and how well a transformer foretells
them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..atomic import replacing
from ..conditions import AcousticEmbedding, ConditionError
from ..data import Recording, find_audio, read_recording
from ..errors import AarError, AudioError
from ..evaluation import CodeCounts, ReconstructionMetrics, token_nll
from ..models import AAR, SAT
from ..models.sat import WINDOWS_PER_BATCH
from .jobs import report
from .models import add_running_model, device_of, integers, load_model, open_transformer, to_device

SCALES = (1, 5, 9, 13, 16)
UNITS = {"mel": "mel distance", "stft": "STFT distance", "si_sdr": "SI-SDR (dB)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="recordings: folder, list (.txt), manifest (.jsonl), shard (.tar)"
    )
    add_running_model(parser)
    parser.add_argument(
        "--scales", type=integers, metavar="K,...",
        help="how many coarse scales to keep, one column each (default: 1,5,9,13,16, those that there are, and all)",
    )  # fmt: skip
    parser.add_argument(
        "--aar", type=Path, metavar="AAR",
        help="directory of AAR.save_pretrained or published .pth: its mean cross entropy per code of the recordings, "
        "conditioned on the acoustic embedding of each window",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every number, of every recording too")
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    model = load_model(args)
    scales = _scales(args.scales, model.num_scales)
    transformer = None if args.aar is None else _transformer(args, model)
    recordings = find_audio(args.data)
    evaluation = Evaluation(model, scales, transformer)
    errors = []
    try:
        for recording in tqdm(recordings, unit=" recordings", delay=2, leave=False, dynamic_ncols=True):
            try:
                evaluation.add(recording)
            except (AudioError, OSError) as error:
                errors.append(error)
    finally:
        for error in errors:
            report(error)
    if not evaluation.files:
        raise AarError(f"{args.data}: none of {len(recordings)} recordings can be read")
    result = {"data": str(args.data), "model": str(args.model), "skipped": len(errors), **evaluation.summary()}
    print(_tables(result))
    if args.json is not None:
        with replacing(args.json) as path:
            path.write_text(json.dumps({**result, "files": evaluation.files}, indent=2, allow_nan=False) + "\n")
    return 2 if errors else 0


class Evaluation:
    """Adds up what recordings show of a tokenizer, and of a transformer if there is one."""

    def __init__(self, model: SAT, scales: Sequence[int], transformer: AAR | None):
        self.model, self.scales, self.transformer = model, tuple(scales), transformer
        self.rate, device = model.config.sample_rate, device_of(model)
        self.metrics = ReconstructionMetrics(self.rate).to(device)
        self.embedding = AcousticEmbedding(self.rate).to(device)
        self.counts = CodeCounts(model.config.schedule, model.config.codebook_size)
        self.files: list[dict] = []
        self.samples = self.windows = 0
        self.nll = torch.zeros(model.config.schedule.total, dtype=torch.float64)

    def add(self, recording: Recording) -> None:
        wave = read_recording(recording, self.rate).to(device_of(self.model))
        codes = self.model.encode(wave[None, None])
        self.counts.update(codes[0])
        versions = self.model.decode_scales(codes, self.scales, len(wave))[:, 0, 0]
        kept = [self.metrics(version, wave) for version in versions]
        entry = {"file": str(recording), "label": recording.label, "seconds": len(wave) / self.rate}
        entry["scales"] = {str(n): _finite(values) for n, values in zip(self.scales, kept, strict=True)}
        if self.transformer is not None:
            nll = self._nll(wave, codes[0]).double().cpu()
            self.nll += nll.sum(dim=0)
            entry["nll"] = nll.mean().item()
        self.files.append(entry)
        self.samples += len(wave)
        self.windows += codes.shape[1]

    def summary(self) -> dict:
        """Means over recordings, each counting alike; those of codes over all windows."""
        scales = {
            str(n): {name: _mean([file["scales"][str(n)][name] for file in self.files]) for name in UNITS}
            for n in self.scales
        }
        codes = {"used": self.counts.used.tolist(), "entropy_bits": self.counts.entropy.tolist()}
        totals = {"recordings": len(self.files), "seconds": self.samples / self.rate, "windows": self.windows}
        result = {**totals, "lengths": list(self.model.config.lengths), "scales": scales, "codes": codes}
        if self.transformer is not None:
            per_token = self.nll / self.windows
            per_scale = [part.mean().item() for part in per_token.split(self.model.config.lengths)]
            result["nll"] = {"nats_per_token": per_token.mean().item(), "per_scale": per_scale}
        return result

    def _nll(self, wave: Tensor, codes: Tensor) -> Tensor:
        """``[windows, total]`` of one recording."""
        windows = self.model.windows().split(wave[None])[0]
        parts = zip(windows.split(WINDOWS_PER_BATCH), codes.split(WINDOWS_PER_BATCH), strict=True)
        return torch.cat([token_nll(self.transformer, self.embedding(part), tokens) for part, tokens in parts])


def _scales(wanted: Sequence[int] | None, available: int) -> tuple[int, ...]:
    if wanted is None:
        return tuple(sorted({available, *(n for n in SCALES if n < available)}))
    if max(wanted) > available:
        raise AarError(f"--scales {max(wanted)}: the model has {available} scales")
    return tuple(sorted(set(wanted)))


def _transformer(args: argparse.Namespace, model: SAT) -> AAR:
    transformer = open_transformer(args.aar, model)
    if transformer.config.condition_dim != AcousticEmbedding.dim:
        raise ConditionError(
            f"{args.aar} is conditioned on {transformer.config.condition_dim} numbers, the acoustic embedding has "
            f"{AcousticEmbedding.dim}: only models trained on it can be evaluated"
        )
    return to_device(transformer, args.device)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows neither NaN nor infinity."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _tables(result: dict) -> str:
    lines = [f"{result['recordings']} recordings, {result['seconds']:.1f} s; means over recordings", ""]
    kept = list(result["scales"])
    lines.append(f"{'scales kept':<16}" + "".join(f"{n:>10}" for n in kept))
    for name, title in UNITS.items():
        cells = (result["scales"][n][name] for n in kept)
        lines.append(f"{title:<16}" + "".join(f"{'-' if cell is None else format(cell, '.3f'):>10}" for cell in cells))
    nll = result.get("nll")
    lines += ["", f"{'scale':<7}{'tokens':>8}{'codes used':>12}{'entropy (bits)':>16}" + "  NLL (nats)" * bool(nll)]
    columns = [result["lengths"], result["codes"]["used"], result["codes"]["entropy_bits"]]
    columns.append(nll["per_scale"] if nll else [None] * len(columns[0]))
    for scale, (tokens, used, entropy, loss) in enumerate(zip(*columns, strict=True), start=1):
        row = f"{scale:<7}{tokens:>8}{used:>12.1%}{entropy:>16.2f}"
        lines.append(row if loss is None else f"{row}{loss:>12.3f}")
    if nll:
        lines += ["", f"cross entropy: {nll['nats_per_token']:.4f} nats per token"]
    return "\n".join(lines)
