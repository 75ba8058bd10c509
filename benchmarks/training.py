"""``python -m benchmarks.training``: a teacher-forced training step of an AAR against plain PyTorch and torch.compile.

A step is forward and backward, without the optimizer's, which is the same for all. First it is checked, in float64 and
on one item, that losses and gradients agree.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from aar import AAR, AARConfig
from aar_kernels.bench.measure import Variant, interleaved, peak_memory

from .agreement import difference
from .common import parser, peaks, print_machine, print_row, random_aar, write
from .plain_aar import PlainAAR
from .roofline import training_flops

Forward = Callable[[Tensor, Tensor], Tensor]


def main(argv: list[str] | None = None, config: AARConfig | None = None) -> int:
    options = parser("benchmarks.training", __doc__)
    options.add_argument("--depth", type=int, default=4, help="blocks (default: 4)")
    options.add_argument("--width", type=int, default=1024, help="channels, 64 a head (default: 1024)")
    options.add_argument("--batch", type=int, nargs="+", default=[4], help="items at once (default: 4)")
    options.add_argument("--autocast", action="store_true", help="also in bf16 autocast")
    options = options.parse_args(argv)

    print_machine()
    config = config or AARConfig(depth=options.depth, width=options.width, heads=options.width // 64)
    model = random_aar(replace(config, condition_drop=0.0)).train()
    forwards: dict[str, Forward] = {"ours": model, "plain PyTorch": PlainAAR(model).forward}
    if not options.no_compile:
        forwards["torch.compile"] = torch.compile(PlainAAR(model).forward)
    rows, wrong = [], {}
    for autocast in [False, True] if options.autocast else [False]:
        wrong |= check(model, forwards, autocast)
        for threads in options.threads:
            torch.set_num_threads(threads)
            measured = peaks()
            for batch in options.batch:
                case = Case(model, forwards, batch, autocast)
                rows.append({"benchmark": "training", "threads": threads, **measured})
                rows[-1] |= measure(case, set(wrong), options.runs, measured["peak_gflops"])
                print_row(rows[-1])
    write(options.json, rows)
    return 1 if wrong else 0
