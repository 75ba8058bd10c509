"""``python -m aar_kernels.bench [OPERATOR...]``: correctness first, then times side by side in one process."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .measure import Case, Variant, graphed, interleaved, machine, peak_bandwidth, peak_gflops, peak_memory

BENCHMARKS = ("quantization", "attention", "modulation", "sampling", "linear", "codecs")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aar_kernels.bench", description=__doc__)
    parser.add_argument("benchmark", nargs="*", default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default: 1 8 32)")
    parser.add_argument("--latent", type=int, nargs="+", default=[64, 128], help="of the quantizer (default: 64 128)")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per variant (default: 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.benchmark) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; one of {', '.join(BENCHMARKS)}")

    about = machine()
    print("; ".join(f"{key}: {value}" for key, value in about.items()))
    rows, wrong = [], False
    for name in arguments.benchmark:
        module = importlib.import_module(f".{name}", __package__)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            peak, bandwidth = peak_gflops(device=arguments.device), peak_bandwidth(device=arguments.device)
            dtype = "bf16" if arguments.device == "cuda" else "fp32"
            peaks = f"{dtype} matrix product {peak:.0f} GFLOP/s, copy {bandwidth:.1f} GB/s"
            print(f"\n{name}, {threads} thread(s), {peaks}\n{_header()}")
            for case in _on_device(module.cases(arguments), arguments.device):
                difference = case.check()
                if difference:
                    wrong = True
                    print(f"WRONG {case.name}, {case.shape}: {difference}; not timed", flush=True)
                    continue
                memory = {label: peak_memory(run, arguments.device) for label, run in case.variants.items()}
                if arguments.device == "cuda":
                    _add_graphs(case.variants, memory)
                times = interleaved(case.variants, arguments.seconds, arguments.device)
                row = {
                    "benchmark": name, "threads": threads, "case": case.name, "shape": case.shape,
                    "flops": case.flops, "bytes": case.bytes, "peak_gflops": peak,
                    "peak_bandwidth": bandwidth,
                    "times_ms": times, "extra_mib": memory,
                }  # fmt: skip
                rows.append(row)
                print(_lines(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return 1 if wrong else 0


def _on_device(cases: Iterator[Case], device: str) -> Iterator[Case]:
    """Each case's tensors are made on the device. Runs are not timed in its context, which slows every call."""
    while True:
        with torch.device(device) if device != "cpu" else contextlib.nullcontext():
            case = next(cases, None)
        if case is None:
            return
        yield case


def _add_graphs(variants: dict[str, Variant], memory: dict[str, float | None]) -> None:
    """Also what of ours and of eager can be captured as a CUDA graph."""
    for label in {"ours", "eager"} & set(variants):
        try:
            variants[f"{label}, graph"] = graphed(variants[label])
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"{label}: no CUDA graph: {str(error).splitlines()[0]}")
        else:
            memory[f"{label}, graph"] = None


def _header() -> str:
    return f"{'case':24} {'shape':22} {'variant':24} {'p50 (p20, p80) ms':28} {'ours is':>8} {'MiB':>7} {'of peak':>8}"


def _lines(row: dict) -> str:
    ours = row["times_ms"]["ours"]["p50"]
    lines = []
    for label, time in row["times_ms"].items():
        spread = f"{time['p50']:.3f} ({time['p20']:.3f}, {time['p80']:.3f})"
        faster = "" if label == "ours" else f"{time['p50'] / ours:.1f}x"
        memory = row["extra_mib"][label]
        # of the peak that bounds the case: of arithmetic, or of memory
        used = max(row["flops"] / row["peak_gflops"], row["bytes"] / row["peak_bandwidth"]) / time["p50"] / 1e6
        extra = "" if memory is None else f"{memory:.1f}"
        lines.append(
            f"{row['case']:24} {row['shape']:22} {label:24} {spread:28} {faster:>8} {extra:>7} {used:>8.0%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
