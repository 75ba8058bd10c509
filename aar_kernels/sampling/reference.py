"""The definition of sampling, in plain PyTorch: what `sample` draws, from the fp32 steps that `common` fixes.

Tokens are drawn in vocabulary order: the first code whose running sum of weights exceeds ``floor(u * total)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import BITS, EXP2, LOWEST, MESSAGE, ROUND, ROUND_BITS, factors


def unavailable() -> str | None:
    return None


def unsupported(problem) -> str | None:
    return None


def sample(
    logits: Tensor, uncond: Tensor | None, seeds: Tensor, position: int, guidance: float, temperature: float,
    top_k: int, top_p: float,
) -> Tensor:  # fmt: skip
    """Codes ``[B, n]`` of ``logits[B, n, V]`` (and ``uncond``), for tokens ``position`` and on of ``seeds[B]``."""
    conditional, unconditional, scale = factors(guidance, temperature)
    x = logits.float()
    if uncond is not None:
        # A token that is masked by -inf stays so, whatever its unconditional half is.
        x = torch.where(x == -torch.inf, x, x * conditional - uncond.float() * unconditional)
    largest = x.amax(-1, keepdim=True)
    torch._assert_async(largest.isfinite().all(), MESSAGE)
    if scale == 0:
        return x.argmax(-1)

    weights = _weights((x - largest) * scale)
    if 0 < top_k < x.shape[-1]:
        kth = x.topk(top_k).values[..., -1:]
        weights = weights.where(x >= kth, 0)
    if top_p < 1:
        ordered = weights.sort(descending=True).values
        running = ordered.cumsum(-1)
        needed = (running[..., -1:].double() * top_p).ceil()
        last = (running < needed).sum(-1, keepdim=True)
        weights = weights.where(weights >= ordered.gather(-1, last), 0)

    running = weights.cumsum(-1)
    token = position + torch.arange(x.shape[1], device=x.device)
    u = uniform(seeds[:, None], token)[..., None]
    target = (u * running[..., -1:].double()).floor()
    return (running <= target).sum(-1)


def _weights(t: Tensor) -> Tensor:
    """``floor(2^BITS * 2^t)`` as int64, for ``t <= 0`` in fp32; NaN weighs nothing, as -inf."""
    t = t.where(t > LOWEST, LOWEST)
    shifted = t + ROUND
    f = t - (shifted - ROUND)
    power = f * EXP2[-1]
    for coefficient in EXP2[-2::-1]:
        power = (power + coefficient) * f
    power = power + 1.0
    exponent = shifted.view(torch.int32) - (ROUND_BITS - BITS)
    return (power.view(torch.int32) + (exponent << 23)).view(torch.float32).long()


def uniform(seeds: Tensor, tokens: Tensor) -> Tensor:
    """Doubles in [0, 1), multiples of 2^-53: one for each seed and index of a token, both int64."""
    zero = torch.zeros_like(tokens)
    counter = (tokens & _LOW, (tokens >> 32) & _LOW, zero, zero)
    high, low, *_ = philox(counter, (seeds & _LOW, (seeds >> 32) & _LOW))
    # The upper 53 of 64 bits, without an int64 whose sign they would reach.
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"); 32-bit words in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (right >> 32) & _LOW ^ c1 ^ k0, right & _LOW, (left >> 32) & _LOW ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
