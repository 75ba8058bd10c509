"""``python -m benchmarks.training``: a teacher-forced training step of an AAR against plain PyTorch and torch.compile.

A step is forward and backward, without the optimizer's, which is the same for all. First it is checked, in float64 and
on one item, that losses and gradients agree.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aar import AAR, AARConfig
from aar.baselines import PlainAAR
from aar_kernels.bench.measure import interleaved, peak_memory

from .common import parser, peaks, print_machine, print_row, random_aar, write
from .roofline import training_flops

Forward = Callable[[Tensor, Tensor], Tensor]  # condition, inputs -> logits


def main(argv: list[str] | None = None, config: AARConfig | None = None) -> int:
    options = parser("benchmarks.training", __doc__)
    options.add_argument("--depth", type=int, default=4, help="blocks (default: 4)")
    options.add_argument("--width", type=int, default=1024, help="channels, 64 a head (default: 1024)")
    options.add_argument("--batch", type=int, nargs="+", default=[4], help="items at once (default: 4)")
    options.add_argument("--autocast", action="store_true", help="also under bf16 autocast")
    options = options.parse_args(argv)

    print_machine()
    config = config or AARConfig(depth=options.depth, width=options.width, heads=options.width // 64)
    model = random_aar(replace(config, condition_drop=0.0)).train()
    rows, any_wrong = [], False
    for autocast in [False, True] if options.autocast else [False]:
        forwards: dict[str, Forward] = {"ours": model, "plain PyTorch": PlainAAR(model).forward}
        if not options.no_compile:
            forwards["torch.compile"] = torch.compile(PlainAAR(model).forward, dynamic=False)
        torch.set_num_threads(max(options.threads))
        for name, found in check(model, forwards, autocast).items():
            print(f"WRONG {name}: {found}; not timed", flush=True)
            any_wrong = True
            del forwards[name]
        for threads in options.threads:
            torch.set_num_threads(threads)
            measured = peaks()
            for batch in options.batch:
                row = {"benchmark": "training", "threads": threads, **measured, "case": "forward and backward"}
                rows.append(row | measure(model, forwards, batch, autocast, options.runs, measured["peak_gflops"]))
                print_row(rows[-1])
    write(options.json, rows)
    return 1 if any_wrong else 0


def check(model: AAR, forwards: dict[str, Forward], autocast: bool) -> dict[str, str]:
    """What is wrong, by variant.

    The loss, and each parameter's gradient in relation to its norm, may be twice as far from float64's as those of
    plain PyTorch, and one rounding.
    """
    double = copy.deepcopy(model).double()
    exact = step(double, PlainAAR(double).forward, 1, False)()
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    errors = {}
    for name, forward in forwards.items():
        loss = step(model, forward, 1, autocast)()
        errors[name] = {"loss": abs(loss / exact - 1).item(), "gradients": _gradient_error(model, double)}
    allowed = {what: 2 * (error + eps) for what, error in errors["plain PyTorch"].items()}
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


def step(model: AAR, forward: Forward, batch: int, autocast: bool) -> Callable[[], Tensor]:
    """A run that returns the loss and leaves the gradients in the model."""
    generator = torch.Generator().manual_seed(batch)
    codes = torch.randint(model.config.codebook_size, (batch, model.schedule.total), generator=generator)
    dtype = model.position.dtype
    condition = torch.randn(batch, model.config.condition_dim, generator=generator).to(dtype)
    inputs = model.quantizer.next_scale_inputs(codes, backend="reference")

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = forward(condition, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        loss.backward()
        return loss.detach()

    return run


def measure(model: AAR, forwards: dict[str, Forward], batch: int, autocast: bool, runs: int, gflops: float) -> dict:
    """Times of a step of each variant, and what memory it needs beyond the weights: gradients too."""
    variants = {name: step(model, forward, batch, autocast) for name, forward in forwards.items()}
    times = interleaved(variants, 0, runs=runs, warmup=1)
    memory = {}
    for name, run in variants.items():
        model.zero_grad(set_to_none=True)
        memory[name] = peak_memory(run)
    flops, config = training_flops(model, batch), model.config
    kind = "bf16 autocast" if autocast else "fp32"
    return {
        "shape": f"batch {batch}, depth {config.depth}, width {config.width}, {kind}",
        "times_ms": times, "extra_mib": memory, "flops": flops,
        "floor_ms": dict.fromkeys(times, flops / gflops / 1e6),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
