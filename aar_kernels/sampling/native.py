"""The compiled CPU backend (csrc): one row in the L1 cache at a time, rows over the threads."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import library
from .common import factors


def unavailable() -> str | None:
    return library.reason


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"compiled for the CPU, but tensors are on {problem.device}"
    return None


def sample(logits, uncond, seeds, position, guidance, temperature, top_k, top_p) -> Tensor:
    uncond = None if uncond is None else uncond.float().contiguous()
    return torch.ops.aar_native.sampling_sample(
        logits.float().contiguous(), uncond, seeds.contiguous(), position, *factors(guidance, temperature), top_k, top_p
    )
