"""Runs benchmarks: correctness first, then times side by side in one process."""

from __future__ import annotations

import contextlib
import importlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import torch

from ..precision import without_tf32
from .measure import Case, add_graphs, interleaved, peak_bandwidth, peak_gflops, peak_memory
from .rows import Row

# torch.compile gives up on a function after eight recompilations and runs it uncompiled without a word, which would be
# timed as "compile". Here it has more, and an error says where they do not suffice.
COMPILER = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}


def run(benchmarks: Sequence[str], options: Namespace, begin: Callable[[str], None]) -> Iterator[Row | dict]:
    """A row for every case; for a case whose results are wrong, what is wrong with it instead.

    Args:
        begin: is told the benchmark, threads and peaks before the rows they hold for.
    """
    with torch._dynamo.config.patch(**COMPILER):
        for name in benchmarks:
            module = importlib.import_module(f".{name}", __package__)
            for threads in options.threads:
                torch.set_num_threads(threads)
                common = {"benchmark": name, "threads": threads, "device": options.device}
                seconds = min(options.seconds, 1.0)
                peaks = {
                    "peak_gflops": peak_gflops(seconds, options.device),
                    "peak_bandwidth": peak_bandwidth(seconds, options.device),
                }
                dtype = "bf16" if options.device == "cuda" else "fp32"
                begin(f"{name}, {threads} thread(s), {dtype} matrix product {peaks['peak_gflops']:.0f} GFLOP/s, "
                      f"memory {peaks['peak_bandwidth']:.1f} GB/s")  # fmt: skip
                for case in _on_device(module.cases(options), options.device):
                    why, failed = _checked(case)
                    if why:
                        yield common | {"case": case.name, "shape": case.shape, "why": why}
                    else:
                        yield Row(**common, **peaks, **_measured(case, options), failed=failed)


def _measured(case: Case, options: Namespace) -> dict:
    variants = {label: go for label, go in case.variants.items() if _asked_for(label, options.peers)}
    memory = {label: peak_memory(go, options.device) for label, go in variants.items()}
    if options.device == "cuda":
        add_graphs(variants, memory)
    # The check has run them too, so that one warm-up is enough.
    times = interleaved(variants, options.seconds, options.device, warmup=1, patience=5 * options.seconds)
    return {
        "case": case.name, "shape": case.shape, "flops": case.flops, "bytes": case.bytes, "sizes": case.sizes,
        "times_ms": times, "extra_mib": memory,
    }  # fmt: skip


def _asked_for(label: str, peers: Sequence[str] | None) -> bool:
    return peers is None or label == "ours" or any(word in label for word in peers)


def _checked(case: Case) -> tuple[str, dict[str, str]]:
    """What is wrong with the results, and the peers that raised an error and were taken out, with the reason.

    One case that fails must not take hours of others along.
    """
    failed: dict[str, str] = {}
    for _ in range(2):
        try:
            with without_tf32():  # timed they are as PyTorch runs them
                return case.check(), failed
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        failed |= _drop_failing_peers(case)
    return why, failed


def _drop_failing_peers(case: Case) -> dict[str, str]:
    """Ours stays, and so does what results are checked against."""
    failed = {}
    for label, go in list(case.variants.items()):
        if label != "ours" and not label.startswith("eager"):
            try:
                go()
            except Exception as error:
                failed[label] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                del case.variants[label]
    return failed


def _on_device(cases: Iterator[Case], device: str) -> Iterator[Case]:
    """Each case's tensors are made on the device. Runs are not timed in its context, which slows every call."""
    while True:
        with torch.device(device) if device != "cpu" else contextlib.nullcontext():
            case = next(cases, None)
        if case is None:
            return
        yield case
