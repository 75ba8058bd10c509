"""``python -m benchmarks.long_audio``: an hour of audio at once: the memory and the time that it takes.

EnCodec 24 kHz of transformers, accelerated, one half after the other, and SAT in the sizes of configs/small-sat.yaml.
Weights are random, and one thread runs. Extra memory is the rise of the process's high-water mark (VmHWM) over what it
held before, the result included. Eager PyTorch is not run: the first convolution of EnCodec's encoder alone gives 32
channels for each sample, 11 GB for an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import aar_kernels as ak
from aar import SAT
from aar_kernels.bench.measure import machine, peak_memory

from .codec import SMALL

Case = tuple[str, Callable[[], Tensor]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.long_audio", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--codec", nargs="+", choices=("encodec", "sat"), default=["encodec", "sat"])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, seconds = [], round(60 * options.minutes)
    for codec in options.codec:
        for name, run in {"encodec": _encodec, "sat": _sat}[codec](seconds):
            rows.append({"case": name, "audio_seconds": seconds, **_measure(run)})
            print(rows[-1], flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps({"machine": machine(), "memory": rows}, indent=1) + "\n")
    return 0


@torch.no_grad()
def _measure(run: Callable[[], Tensor]) -> dict:
    results: list[Tensor] = []
    started = time.perf_counter(), time.process_time()
    extra = peak_memory(lambda: results.append(run()))
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    return {"extra_mib": extra, "result_mib": results[0].nbytes / 2**20, "wall_s": wall, "cpu_s": cpu}


def _encodec(seconds: int) -> Iterator[Case]:
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig()).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed"):
            buffer.normal_()  # random weights have codebooks of zeros
    ak.accelerate(model)
    wav, frames = 0.3 * torch.randn(1, 1, 24000 * seconds), 75 * seconds
    yield "EnCodec 24 kHz encoder", lambda: model.encoder(wav)
    latents = torch.randn(1, frames, 128).mT
    yield "EnCodec 24 kHz quantizer encode, 8 codebooks", lambda: model.quantizer.encode(latents, 6.0)
    yield "EnCodec 24 kHz decoder", lambda: model.decoder(latents)


def _sat(seconds: int) -> Iterator[Case]:
    torch.manual_seed(0)
    model = SAT(SMALL).eval()
    wav = 0.3 * torch.randn(1, 1, model.config.sample_rate * seconds)
    yield "SAT small encode", lambda: model.encode(wav)
    codes = torch.zeros(1, seconds, model.config.schedule.total, dtype=torch.int64)
    yield "SAT small decode", lambda: model.decode(codes)


if __name__ == "__main__":
    sys.exit(main())
