"""The compiled CPU backend (csrc): the kernels of the layers, called in turn without coming back to Python."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import library


def unavailable() -> str | None:
    return library.reason


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"compiled for the CPU, but tensors are on {problem.device}"
    if problem.dtype != torch.float32:
        return f"computes in float32, not in {problem.dtype}"
    if "fp8" in problem.needs:
        return "has no fp8: on a CPU, int8 is faster and more exact"
    return None


def step(x: Tensor, weights, scales, biases, log_scales, modulations, caches, *numbers) -> Tensor:
    rows = [modulation if modulation.stride(1) == 1 else modulation.contiguous() for modulation in modulations]
    out = torch.ops.aar_native.transformer_step(
        x.contiguous(), weights, scales, biases, log_scales, rows, caches, *numbers
    )
    # Writes of a custom operator leave version counters alone; autograd would miss a cache that it saved.
    torch.autograd.graph.increment_version(caches)
    return out
