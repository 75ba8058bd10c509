"""Timing, memory and the machine's own peaks: what every benchmark of the library reports."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..linear import linear, pack

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
    sizes: dict[str, int | str] = field(default_factory=dict)  # the shape size by size, for lines over one of them


def interleaved(
    variants: dict[str, Variant], seconds: float, device: str = "cpu", *, runs: int = 5, warmup: int = 2,
    patience: float = math.inf, clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Times of each variant in milliseconds: ``p50``, ``p20``, ``p80`` and the number of ``runs``.

    One run of each in turn, so that whatever else the machine does falls on all alike, for ``seconds`` per variant, and
    at least ``runs`` times, or three where that would take more than ``patience`` seconds per variant, after ``warmup``
    runs that do not count. On CUDA a time is what passes between two events around a run, on an idle device: what the
    host takes to launch counts where it is longer. On a CPU ``clock`` may be `time.process_time`, so that one thread is
    timed fairly while other processes take turns with it.
    """
    timed = _cuda_milliseconds if device == "cuda" else partial(_milliseconds, clock=clock)
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    start, rounds, each = time.perf_counter(), 0, max(len(variants), 1)
    while (spent := (time.perf_counter() - start) / each) < seconds or rounds < (runs if spent < patience else 3):
        for name, run in variants.items():
            times[name].append(timed(run))
        rounds += 1
    return {name: _percentiles(values) for name, values in times.items()}


def _milliseconds(run: Variant, clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return 1e3 * (clock() - start)


def _cuda_milliseconds(run: Variant) -> float:
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graphed(run: Variant) -> Variant:
    """Replays of a CUDA graph of ``run``: its kernels without what the host takes to launch them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def add_graphs(variants: dict[str, Variant], memory: dict[str, float | None]) -> None:
    """Also what of ours and of eager can be captured as a CUDA graph."""
    for label in {"ours", "eager"} & set(variants):
        try:
            variants[f"{label}, graph"] = graphed(variants[label])
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"{label}: no CUDA graph: {str(error).splitlines()[0]}")
        else:
            memory[f"{label}, graph"] = None


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (20, 50, 80)}
    return at | {"runs": len(ordered)}


def peak_memory(run: Variant, device: str = "cpu") -> float | None:
    """MiB that one run needs beyond what the process holds before it: the rise of the high-water mark (Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
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


def peak_gflops(seconds: float = 1.0, device: str = "cpu") -> float:
    """GFLOP/s of the best large matrix product, with the present number of threads: fp32, by PyTorch or by
    `aar_kernels.linear`; bf16 on CUDA."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    products: dict[str, Variant] = {"mm": lambda: a @ a}
    if device == "cpu":
        packed = pack(a)
        products["linear"] = lambda: linear(a, packed)
    return 2 * size**3 / _best(products, seconds, device) / 1e6


def peak_bandwidth(seconds: float = 1.0, device: str = "cpu") -> float:
    """GB/s of a copy that no cache holds, read and written, or of reading alone, whichever is more."""
    source = torch.randn(1 << (28 if device == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best({"copy": lambda: target.copy_(source)}, seconds, device) / 1e6
    return max(copy, read_bandwidth(seconds, device))


def read_bandwidth(seconds: float = 1.0, device: str = "cpu") -> float:
    """GB/s read from memory by a sum or by a product with a vector, whichever is faster."""
    matrix, vector = torch.ones(2**14, 2**12, device=device), torch.ones(2**12, device=device)  # 256 MiB
    return matrix.nbytes / _best({"sum": matrix.sum, "product": lambda: matrix @ vector}, seconds, device) / 1e6


def _best(variants: dict[str, Variant], seconds: float, device: str) -> float:
    """Milliseconds, at p20, of the fastest variant."""
    return min(times["p20"] for times in interleaved(variants, seconds / len(variants), device).values())


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
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "date": time.strftime("%Y-%m-%d"),
    }
