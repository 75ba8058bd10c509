"""``python -m benchmarks.training``: a training step of an AAR or a SAT against plain PyTorch (and torch.compile).

A step is forward and backward, without the optimizer's, which is the same for all. First it is checked, in float64 and
on one item, that losses and gradients agree. The AAR is teacher-forced and of random weights; a SAT is that of a
training's configuration (``--sat configs/small-sat.yaml``), with its losses and the update of its codebooks, or, with
``--autoencoder``, its convolutions and LSTMs alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from aar import SAT, AARConfig
from aar.training.config import SATTraining, read_config
from aar_kernels.bench.measure import interleaved, peak_memory

from .common import parser, peaks, print_machine, print_row, random_aar, write
from .training_steps import PLAIN, AARSteps, AutoencoderSteps, SATSteps, Steps


def main(argv: Sequence[str] | None = None, config: AARConfig | SATTraining | None = None) -> int:
    options = parser("benchmarks.training", __doc__)
    options.add_argument("--depth", type=int, default=4, help="blocks (default: 4)")
    options.add_argument("--width", type=int, default=1024, help="channels, 64 a head (default: 1024)")
    options.add_argument("--sat", type=Path, metavar="CONFIG", help="train the SAT of this configuration instead")
    options.add_argument("--autoencoder", action="store_true", help="of that SAT its encoder and decoder alone")
    options.add_argument("--batch", type=int, nargs="+", default=[4], help="items at once (default: 4)")
    options.add_argument("--autocast", action="store_true", help="also under bf16 autocast")
    options = options.parse_args(argv)

    print_machine()
    if config is None and options.sat:
        config = read_config(SATTraining, options.sat)
    config = config or AARConfig(depth=options.depth, width=options.width, heads=options.width // 64)
    rows, any_wrong = [], False
    for autocast in [False, True] if options.autocast else [False]:
        if isinstance(config, SATTraining) and options.autoencoder:
            torch.manual_seed(0)
            steps = AutoencoderSteps(SAT(config.model), compiled=not options.no_compile)
        elif isinstance(config, SATTraining):
            steps = SATSteps(config)
        else:
            model = random_aar(replace(config, condition_drop=0.0)).train()
            steps = AARSteps(model, compiled=not options.no_compile)
        torch.set_num_threads(max(options.threads))
        for name, found in check(steps, autocast).items():
            print(f"WRONG {name}: {found}; not timed", flush=True)
            any_wrong = True
            del steps.models[name]
        for threads in options.threads:
            torch.set_num_threads(threads)
            measured = peaks()
            for batch in options.batch:
                row = {"benchmark": "training", "threads": threads, **measured, "case": "forward and backward"}
                rows.append(row | measure(steps, batch, autocast, options.runs, measured["peak_gflops"]))
                print_row(rows[-1])
    write(options.json, rows)
    return 1 if any_wrong else 0


def check(steps: Steps, autocast: bool) -> dict[str, str]:
    """What is wrong, by variant.

    The loss, and each parameter's gradient in relation to its norm, may be twice as far from float64's as those of
    plain PyTorch, and one rounding.
    """
    double = steps.double()
    exact = double.step(PLAIN, 1, False)()
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    errors = {}
    for name, model in steps.models.items():
        loss = steps.step(name, 1, autocast)()
        error = _gradient_error(model, double.models[PLAIN])
        errors[name] = {"loss": abs(loss / exact - 1).item(), "gradients": error}
    allowed = {what: 2 * (error + eps) for what, error in errors[PLAIN].items()}
    wrong = {}
    for name, found in errors.items():
        over = [f"{what} off by {error:.2g}, allowed {allowed[what]:.2g}" for what, error in found.items()
                if not error <= allowed[what]]  # fmt: skip
        if over:
            wrong[name] = ", ".join(over)
    return wrong


def _gradient_error(model: nn.Module, double: nn.Module) -> float:
    """The largest of the parameters' relative errors; infinite where a gradient is missing."""
    largest = 0.0
    for ours, exact in zip(model.parameters(), double.parameters(), strict=True):
        if (ours.grad is None) != (exact.grad is None):
            return float("inf")
        if exact.grad is not None:
            largest = max(largest, ((ours.grad - exact.grad).norm() / exact.grad.norm()).item())
    return largest


def measure(steps: Steps, batch: int, autocast: bool, runs: int, gflops: float) -> dict:
    """Times of a step of each variant, and what memory it needs beyond the weights: gradients too."""
    variants = {name: steps.step(name, batch, autocast) for name in steps.models}
    times = interleaved(variants, 0, runs=runs, warmup=1)
    memory = {}
    for name, run in variants.items():
        for model in steps.models.values():
            model.zero_grad(set_to_none=True)
        memory[name] = peak_memory(run)
    flops, kind = steps.flops(batch), "bf16 autocast" if autocast else "fp32"
    return {
        "shape": f"{steps.name}, batch {batch}, {kind}", "times_ms": times, "extra_mib": memory, "flops": flops,
        "floor_ms": dict.fromkeys(times, flops / gflops / 1e6),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
