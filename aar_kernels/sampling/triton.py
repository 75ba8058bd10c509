"""Triton backend: one program per token (the kernel: `triton_kernels`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import ASSERTING, assertions, unavailable, wrong_device  # noqa: F401
from . import triton_kernels as kernels
from .common import factors


def unsupported(problem) -> str | None:
    if reason := wrong_device(problem):
        return reason
    if problem.dim > kernels.MAX_VOCABULARY:
        return f"at most {kernels.MAX_VOCABULARY} codes, got {problem.dim}"
    return None


def sample(logits, uncond, seeds, position, guidance, temperature, top_k, top_p) -> Tensor:
    batch, tokens, vocabulary = logits.shape
    codes = logits.new_empty(batch, tokens, dtype=torch.int64)
    if codes.numel() == 0:
        return codes
    uncond = None if uncond is None else uncond.contiguous()
    settings = factors(guidance, temperature)
    with torch.cuda.device_of(logits), assertions():
        kernels.sample_kernel[(codes.numel(),)](
            codes, logits.contiguous(), uncond, seeds.contiguous(), position, tokens, vocabulary, *settings,
            top_k, top_p, GREEDY=settings.scale == 0, TOP_K=0 < top_k < vocabulary, TOP_P=top_p < 1,
            **kernels.options(vocabulary), **ASSERTING,
        )  # fmt: skip
    return codes
