"""``python -m benchmarks.generation``: sampling one window of sound with an AAR, against the obvious ways to do it.

Ours with weights in fp32, bf16, int8 and, on CUDA, fp8; the same model in plain PyTorch as public code runs it, and
torch.compile of that; the same transformer as a next-token model, in plain PyTorch and on our kernels. First it is
checked that all compute what they should, in float64. Guided throughout, random weights.

With ``--device cuda`` ours is one CUDA graph, beside the same loop launched kernel by kernel ("eager"), and plain
PyTorch also runs under bf16 autocast, where that is what ours in bf16 is to be compared with. Of the next-token models
plain PyTorch's is also one CUDA graph per token ("graph"), in fp32 and with all of the model in bf16.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from aar import AAR, AARConfig
from aar.baselines import Fused, Graphed, NextToken, Plain, PlainAAR
from aar_kernels.bench.measure import Variant, interleaved

from .agreement import Truth, check_greedy, check_next_token, check_weights
from .common import breakdown, parser, peaks, print_machine, print_row, random_aar, write
from .roofline import Pass, next_token_passes, scale_passes

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
ON_CPU = ("fp32", "bf16", "int8")  # fp8 by name: it is not packed for speed there, but shows what it does to logits
CODEBOOKS = 10  # of a residual codec at 75 frames a second: 750 tokens, flattened
CHECKED = 2  # items in the checks


def main(argv: list[str] | None = None, config: AARConfig | None = None) -> int:
    options = parser("benchmarks.generation", __doc__)
    options.add_argument("--depth", type=int, default=16, help="blocks of 64 channels each (default: 16)")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="items at once (default: 1 4)")
    options.add_argument("--cfg", type=float, default=4.0, help="guidance (default: 4)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    options.add_argument("--weights", nargs="+", choices=WEIGHTS, help="default: all that the device has")
    options.add_argument("--tokens", type=int, default=10, help="of a next-token sequence that are timed (default: 10)")
    options.add_argument("--full", action="store_true", help="time every token of the next-token sequences")
    options.add_argument("--profile", action="store_true", help="also say where the time of one run goes")
    options = options.parse_args(argv)
    options.weights = options.weights or (list(WEIGHTS) if options.device == "cuda" else ON_CPU)

    print_machine()
    model = random_aar(config or AARConfig.of_depth(options.depth)).requires_grad_(False).to(options.device)
    bench = Generation(model, options)
    torch.set_num_threads(max(options.threads))
    accuracy = bench.check()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        measured = peaks(options.device)
        for batch in options.batch:
            rows.append({"benchmark": "generation", "threads": threads, **measured, **bench.measure(batch, measured)})
            print_row(rows[-1])
    write(options.json, rows, accuracy=accuracy)
    return 1 if bench.wrong else 0


class Generation:
    """The variants on one model, and what is wrong with them."""

    def __init__(self, model: AAR, options):
        self.model, self.options = model, options
        self.dtypes = {f"ours {name}": WEIGHTS[name] for name in options.weights}
        self.samplers = {name: partial(model.sample, dtype=dtype) for name, dtype in self.dtypes.items()}
        if options.device == "cuda":
            for name, dtype in list(self.dtypes.items()):
                self.samplers[f"{name}, eager"] = partial(model.sample, dtype=dtype, graph=False)
                self.dtypes[f"{name}, eager"] = dtype
        self.samplers["plain PyTorch"] = PlainAAR(model).generate
        if options.device == "cuda" and "bf16" in options.weights:
            self.samplers["plain PyTorch, autocast"] = PlainAAR(model, autocast=torch.bfloat16).generate
            self.dtypes["plain PyTorch, autocast"] = torch.bfloat16
        if not options.no_compile:
            self.samplers["torch.compile"] = PlainAAR(model, compiled=True).generate
        self.next_token: dict[str, tuple[NextToken, torch.dtype]] = {}
        for length in (CODEBOOKS * model.schedule.length, model.schedule.total):
            self.next_token[f"next token, {length}, plain PyTorch"] = Plain(model, length), torch.float32
            if options.device == "cuda":
                self.next_token[f"next token, {length}, graph"] = Graphed(model, length), torch.float32
                if "bf16" in options.weights:
                    narrow = copy.deepcopy(model).to(torch.bfloat16), length
                    self.next_token[f"next token, {length}, graph bf16"] = Graphed(*narrow), torch.bfloat16
            for name in options.weights:
                dtype = WEIGHTS[name]
                self.next_token[f"next token, {length}, kernels {name}"] = Fused(model, length, dtype), dtype
        self.wrong: dict[str, str] = {}

    def check(self) -> dict[str, dict[str, float]]:
        """Finds out which variants are wrong, and says so. Returns what narrow weights do, see `check_weights`."""
        cfg, condition = self.options.cfg, self._condition(CHECKED)
        truth = Truth(self.model, condition)
        greedy = {name: sampler(condition, cfg=cfg, temperature=0) for name, sampler in self.samplers.items()}
        for name, codes in greedy.items():
            if self.dtypes.get(name, torch.float32) == torch.float32:  # the others differ by their logits alone
                self._note(name, check_greedy(truth, codes, cfg))
        effects = {}
        for name in [f"ours {name}" for name in self.options.weights]:
            dtype = self.dtypes[name]
            found, effects[name] = check_weights(truth, greedy["plain PyTorch"], cfg, dtype)
            self._note(name, found)
            line = "{}: logits off by {max:.2g}, rms {rms:.2g} of {rms_of_logits:.2g}; {same_codes:.1%} same codes"
            print(line.format(name, **effects[name]), flush=True)
        for name, (model, dtype) in self.next_token.items():
            self._note(name, check_next_token(model, condition, dtype))
        return effects

    def _note(self, name: str, found: str) -> None:
        if found:
            self.wrong[name] = found
            print(f"WRONG {name}: {found}; not timed", flush=True)

    def measure(self, batch: int, measured: dict[str, float]) -> dict:
        """Times of every variant that is right, with the floor of each."""
        model, cfg, condition = self.model, self.options.cfg, self._condition(batch)
        variants: dict[str, Variant] = {}
        passes: dict[str, list[Pass]] = {}
        timed_share: dict[str, float] = {}
        for name, sampler in self.samplers.items():
            variants[name] = partial(sampler, condition, cfg=cfg)
            passes[name] = scale_passes(model, batch, self.dtypes.get(name, torch.float32))
        for name, (sequence, dtype) in self.next_token.items():
            variants[name], timed_share[name] = self._tokens(sequence, condition)
            passes[name] = next_token_passes(model, batch, sequence.length, dtype)
        variants = {name: run for name, run in variants.items() if name not in self.wrong}
        times = interleaved(variants, 0, self.options.device, runs=self.options.runs, warmup=1)
        for name, share in timed_share.items():
            if name in times:
                times[name].update({key: times[name][key] / share for key in ("p20", "p50", "p80")})
        gflops, gbs = measured["peak_gflops"], measured["read_gbs"]
        row = {
            "case": "one window", "shape": f"batch {batch}, depth {model.config.depth}", "times_ms": times,
            "timed_share": {name: timed_share.get(name, 1.0) for name in times},
            "floor_ms": {name: sum(step.floor(gflops, gbs) for step in passes[name]) for name in times},
            "flops": {name: sum(step.flops for step in passes[name]) for name in times},
            "weight_bytes_per_pass": {name: passes[name][-1].weight_bytes for name in times},
        }  # fmt: skip
        if self.options.profile:
            row["profile_ms"] = {name: breakdown(variants[name]) for name in self.samplers if name in times}
        return row

    @torch.no_grad()
    def _tokens(self, sequence: NextToken, condition: Tensor) -> tuple[Callable[[], object], float]:
        """A run of some tokens spread evenly over the sequence, and which share of all they are.

        The cost of a token grows linearly with its position, so that the tokens in the middle of equal parts have the
        mean cost. Modulations, computed once per sample, are then left out: 1 in 400 weights read.
        """
        if self.options.full:
            return partial(sequence.generate, condition, cfg=self.options.cfg), 1.0
        count, length = min(self.options.tokens, sequence.length), sequence.length
        sequence.begin(condition)
        sequence.fill()
        codes = torch.zeros(len(condition), dtype=torch.int64, device=condition.device)

        def run() -> None:
            for i in range(count):
                sequence.step((2 * i + 1) * length // (2 * count), codes, cfg=self.options.cfg)

        return run, count / length

    def _condition(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, self.model.config.condition_dim, generator=generator).to(self.options.device)


if __name__ == "__main__":
    sys.exit(main())
