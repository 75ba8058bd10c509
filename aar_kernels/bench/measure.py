"""Timing, memory and the machine's own peaks: what every benchmark of the library reports."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

Variant = Callable[[], object]


@dataclass
class Case:
    """One table row: variants that compute the same, what shows that they do, and the useful work."""

    name: str
    shape: str
    variants: dict[str, Variant]  # "ours" first
    check: Callable[[], str]  # "" where the results agree, else what differs
    flops: int  # useful floating-point operations of one run
    bytes: int = 0  # that must at least be read and written, where memory may be the bound
    results: dict = field(default_factory=dict)


def interleaved(
    variants: dict[str, Variant], seconds: float, *, runs: int = 5, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Times of each variant in milliseconds: ``p50``, ``p20``, ``p80`` and the number of ``runs``.

    One run of each in turn, so that whatever else the machine does falls on all alike, for ``seconds`` per variant
    (at least ``runs`` times), after ``warmup`` runs that do not count.
    """
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds * len(variants)
    while time.perf_counter() < deadline or min(map(len, times.values()), default=runs) < runs:
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _percentiles(values) for name, values in times.items()}


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (20, 50, 80)}
    return at | {"runs": len(ordered)}


def peak_memory(run: Variant) -> float | None:
    """MiB that one run needs beyond what the process holds before it: the rise of the high-water mark (Linux)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed by earlier runs would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0) / 1024
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_gflops(seconds: float = 1.0) -> float:
    """fp32 GFLOP/s of the machine's best large matrix product, with the present number of threads."""
    a = torch.randn(1024, 1024)
    best = interleaved({"mm": lambda: a @ a}, seconds)["mm"]["p20"]
    return 2 * 1024**3 / best / 1e6


def peak_bandwidth(seconds: float = 1.0) -> float:
    """GB/s, read and written, of a copy that no cache holds, with the present number of threads."""
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    best = interleaved({"copy": lambda: target.copy_(source)}, seconds)["copy"]["p20"]
    return 2 * source.nbytes / best / 1e6


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags")).split()
    except (OSError, StopIteration):
        flags = []
    sets = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if flag in flags]
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "instruction sets": " ".join(sets) or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
