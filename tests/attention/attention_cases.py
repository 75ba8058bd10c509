"""Random inputs of attention, and every result of a backend on them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from aar_kernels import ScaleSchedule
from aar_kernels.attention import ScaleCache, scale_attention, scale_attention_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (64, 32, 40, 128, 96, 72)
SCHEDULES = ("multiscale", "unordered", "causal", "one scale", "one token")
LAYOUTS = ("own", "one projection", "heads first", "channels strided")
SEEDS = range(20)


@dataclass
class AttentionCase:
    """``q, k, v`` and the gradient of the result, all ``[batch, length, heads, head_dim]``."""

    schedule: ScaleSchedule
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    head_log_scale: Tensor | None

    def as_dtype(self, dtype: torch.dtype) -> AttentionCase:
        """The same values, fresh leaves in the same places of memory; the scale is fp32 at least."""
        q, k, v, grad = (tensor.detach().to(dtype, copy=True) for tensor in (self.q, self.k, self.v, self.grad))
        scale = self.head_log_scale
        if scale is not None:
            scale = scale.detach().to(torch.promote_types(dtype, torch.float32), copy=True)
        return AttentionCase(self.schedule, q, k, v, grad, scale)

    def reordered(self) -> tuple[AttentionCase, Tensor]:
        """Channels of queries and keys in another order, which changes rounding alone; and the way back."""
        dim = self.q.shape[3]
        order = torch.randperm(dim, generator=torch.Generator().manual_seed(dim))
        other = self.as_dtype(self.q.dtype)
        other.q, other.k = other.q[..., order].clone(), other.k[..., order].clone()
        return other, order.argsort()

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.q, self.k, self.v, self.head_log_scale) if tensor is not None]


def attention_case(seed: int | str, **chosen) -> AttentionCase:
    """The random case of ``seed``, or ``"published"``: 455 tokens, 64 channels, where sums are long."""
    rng = random.Random(seed)
    number = 0 if seed == "published" else seed
    options = {
        "dim": DIMS[number % 6], "kind": SCHEDULES[number % 5], "layout": LAYOUTS[number % 4],
        "cosine": number // 2 % 2 == 0, "batch": (2, 1, 3)[number % 3], "heads": (2, 3, 1)[number // 3 % 3],
        "dtype": DTYPES[number // 2 % 3] if number % 2 else torch.float32,
    }  # fmt: skip
    if seed == "published":
        options |= {"dim": 64, "kind": "published", "batch": 1, "heads": 4, "dtype": torch.float32}
    assert chosen.keys() <= options.keys()
    options |= chosen
    lengths = {
        "published": ScaleSchedule.quadratic(16, 75).lengths,
        "multiscale": ScaleSchedule.quadratic(rng.randint(2, 9), rng.randint(9, 60)).lengths,
        "unordered": [rng.randint(1, 70) for _ in range(rng.randint(2, 6))],
        "causal": [1] * rng.randint(2, 120),
        "one scale": [rng.randint(2, 200)],
        "one token": [1],
    }[options["kind"]]
    schedule = ScaleSchedule(lengths)
    generator = torch.Generator().manual_seed(number)
    shape = (options["batch"], schedule.total, options["heads"], options["dim"])
    dtype = options["dtype"]
    q, k, v = _placed(options["layout"], shape, generator, dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    # Up to and above the limit of ln 100.
    scale = torch.linspace(5.0, 0.0, options["heads"] + 1)[1:] if options["heads"] > 1 else torch.tensor([2.0])
    if options["cosine"]:
        scale[0] = 5.0 if number % 2 else 3.0
    return AttentionCase(schedule, q, k, v, grad, scale if options["cosine"] else None)


def _placed(layout: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    batch, length, heads, dim = shape
    if layout == "one projection":
        return list(torch.randn(batch, length, 3, heads, dim, generator=generator).to(dtype).unbind(2))
    if layout == "heads first":
        return [torch.randn(batch, heads, length, dim, generator=generator).to(dtype).transpose(1, 2) for _ in "qkv"]
    if layout == "channels strided":
        return [torch.randn(batch, length, dim, heads, generator=generator).to(dtype).mT for _ in "qkv"]
    return [torch.randn(shape, generator=generator).to(dtype) for _ in "qkv"]


def forward_and_gradients(case: AttentionCase, backend: str) -> dict[str, Tensor]:
    """The result and the gradient by every input."""
    leaves = [leaf.requires_grad_() for leaf in case.leaves()]
    out = scale_attention(*leaves[:3], case.schedule, head_log_scale=case.head_log_scale, backend=backend)
    grads = torch.autograd.grad(out, leaves, case.grad)
    return {"out": out.detach()} | dict(zip(("q", "k", "v", "head_log_scale"), grads, strict=False))


def by_steps(case: AttentionCase, backend: str) -> tuple[Tensor, ScaleCache]:
    """The same attention one scale at a time, and the cache it leaves."""
    batch, _, heads, dim = case.q.shape
    cache = ScaleCache.empty(batch, case.schedule.total, heads, dim, dtype=case.q.dtype)
    parts = []
    for part in case.schedule.slices():
        tensors = (tensor.detach()[:, part] for tensor in (case.q, case.k, case.v))
        scale = None if case.head_log_scale is None else case.head_log_scale.detach()
        parts.append(scale_attention_step(*tensors, cache, head_log_scale=scale, backend=backend))
    return torch.cat(parts, dim=1), cache
