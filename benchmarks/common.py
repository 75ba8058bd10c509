"""What both benchmarks need: a model to time, the machine's peaks, tables and files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from aar import AAR, AARConfig
from aar_kernels.bench.measure import machine, peak_gflops, read_bandwidth


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--runs", type=int, default=5, help="of each variant, in turn, after one (default: 5)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser


def random_aar(config: AARConfig, seed: int = 0) -> AAR:
    """An AAR whose every part matters to the result; `AAR.reset_parameters` starts near the identity."""
    torch.manual_seed(seed)
    model = AAR(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_scale"):
                parameter.uniform_(0, 3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif name.endswith("weight") and not name.startswith("quantizer."):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif not name.startswith("quantizer."):
                parameter.normal_(std=0.5)
    return model


def peaks(device: str = "cpu") -> dict[str, float]:
    """The most that was measured, with the present number of threads: GFLOP/s in fp32, on CUDA in bf16, and GB/s read
    from memory."""
    return {"peak_gflops": peak_gflops(device=device), "read_gbs": read_bandwidth(device=device)}


def print_machine() -> None:
    print("; ".join(f"{key}: {value}" for key, value in machine().items()), flush=True)


def print_row(row: dict) -> None:
    """Prints the times of a row's variants, each with its ratio to the first, and how near the floor it came."""
    peak = f"{row['peak_gflops']:.0f} GFLOP/s, {row['read_gbs']:.1f} GB/s read"
    print(f"\n{row['benchmark']}: {row['case']}, {row['shape']}, {row['threads']} thread(s), at best {peak}")
    rates = row.get("gflops", {})
    head = f"{'variant':36} {'p50 (p20, p80) ms':30} {'ratio':>7} {'floor ms':>9} {'of time':>8} {'MiB':>7}"
    print(head + (f" {'GFLOP/s':>8}" if rates else ""))
    first = next(iter(row["times_ms"].values()))["p50"] if row["times_ms"] else 0.0
    for name, times in row["times_ms"].items():
        spread = f"{times['p50']:.1f} ({times['p20']:.1f}, {times['p80']:.1f})"
        floor, memory = row["floor_ms"][name], row.get("extra_mib", {}).get(name)
        mib = "" if memory is None else f"{memory:.0f}"
        rate = f" {rates[name]:8.1f}" if name in rates else ""
        estimated = "" if row.get("timed_share", {}).get(name, 1) == 1 else "  *"
        print(f"{name:36} {spread:30} {times['p50'] / first:6.2f}x {floor:9.1f} {floor / times['p50']:8.0%} {mib:>7}"
              f"{rate}{estimated}")  # fmt: skip
    shares = [share for share in row.get("timed_share", {}).values() if share < 1]
    if shares:
        print(f"* from the times of {min(shares):.1%} or more of the tokens, evenly spaced")
    for name, parts in row.get("profile_ms", {}).items():
        largest = ", ".join(f"{part} {spent:.1f}" for part, spent in list(parts.items())[:8])
        print(f"{name}, ms by operator: {largest}")
    sys.stdout.flush()


def write(path: Path | None, rows: list[dict], **others) -> None:
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **others, "rows": rows}, indent=1) + "\n")


def breakdown(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one run by operator: those that Python calls, with all that they call; and Python itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        run()
        total = 1e3 * (time.perf_counter() - start)
    spent: dict[str, float] = {}
    for event in profile.events():
        if event.cpu_parent is None:
            spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3
    spent["Python, and the profiler"] = max(total - sum(spent.values()), 0.0)
    return dict(sorted(spent.items(), key=lambda item: -item[1]))
