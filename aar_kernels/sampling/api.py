"""The public function of sampling: it checks its input, then picks a backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import dispatch
from . import ops
from .common import MAX_VOCABULARY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample(
    logits: Tensor, *, uncond: Tensor | None = None, guidance: float = 0.0, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, seeds: Tensor, position: int = 0, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """One code per token: guidance, temperature, top-k, top-p and the draw, in this order. Not differentiable.

    A backend is a matter of speed alone: from the same seed all draw the same codes, bit for bit. Nor does an item's
    draw depend on the batch it is in, on threads, or on how its tokens are split over calls.

    Args:
        logits: ``[B, n, V]`` in fp32, bf16 or fp16 (the last two are converted exactly to fp32, in which everything is
            computed), V up to 65536. -inf masks a code: it is never drawn.
        uncond: as logits, those without the condition. Not read if guidance is 0.
        guidance: classifier-free guidance, ``(1 + guidance) * logits - guidance * uncond`` (arXiv 2207.12598; VAR,
            arXiv 2404.02905, and AAR, arXiv 2408.09027, sample so).
        temperature: divides the logits; 0 takes the most probable code, the first of equal ones.
        top_k: keep the k most probable codes, and those equal to the k-th; 0 keeps all.
        top_p: of those, keep the fewest most probable whose probability reaches p, and those equal to the last; 1
            keeps all. The most probable code is always kept.
        seeds: ``[B]`` int64, one random stream per item (Philox4x32-10 keyed by it, the token's index the counter).
        position: index within the item of the first token of this call.

    Returns:
        ``[B, n]`` int64.

    Probabilities are integers of 30 bits below the most probable code's (`common`): a code less probable than 2^-30
    times that one is never drawn, and the distribution is within ``V * 2^-30 + 4e-6`` of the exact one (total
    variation). "Equal" in top-p means equal as such integers.

    Raises, on every backend alike:
        ValueError: shapes, dtypes, devices or settings that do not fit.
        RuntimeError: a NaN or +inf among the (guided) logits, or a token with none but -inf (under CUDA a device-side
            assertion: the host does not wait for the result).
        BackendError: a forced backend that cannot run the call.
    """
    if logits.dim() != 3 or logits.dtype not in DTYPES or not 1 <= logits.shape[2] <= MAX_VOCABULARY:
        wanted = f"fp32, bf16 or fp16 [B, n, 1 <= V <= {MAX_VOCABULARY}]"
        raise ValueError(f"logits must be {wanted}, got {logits.dtype} {list(logits.shape)}")
    if uncond is not None and (uncond.shape != logits.shape or uncond.dtype != logits.dtype):
        wanted = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"uncond must be as logits, {wanted}; got {uncond.dtype} {list(uncond.shape)}")
    if seeds.shape != logits.shape[:1] or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 [{logits.shape[0]}], got {seeds.dtype} {list(seeds.shape)}")
    if not 0 <= guidance < math.inf or (guidance > 0 and uncond is None):
        raise ValueError(f"guidance must be 0 or more, and 0 without uncond; got {guidance}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0 or position < 0:
        raise ValueError(f"top_k and position must be 0 or more, got {top_k} and {position}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    logits, uncond = logits.detach(), None if uncond is None or guidance == 0 else uncond.detach()
    name = dispatch.select("sampling_sample", logits, uncond, seeds, backend=backend, dim=logits.shape[2])
    return ops.sample(logits, uncond, seeds, position, guidance, temperature, top_k, top_p, name)
