"""Random calls of `sample`, rows that are hard on it, and its distribution by sorting in float64."""

from __future__ import annotations

import random

import torch
from torch import Tensor

INF = float("inf")


def draw_call(seed: int, vocabulary: int | None = None, rows: int = 12) -> dict:
    """Arguments of `sample` that `seed` picks."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = vocabulary or pick.choice([1, 2, 7, 8, 31, 64, 100, 129, 1000, 1024, 3000])
    batch = pick.choice([1, 2, 3])
    dtype = pick.choice([torch.float32] * 3 + [torch.bfloat16, torch.float16])
    logits, uncond = torch.randn(2, batch, rows // batch, vocabulary, generator=generator) * pick.choice([0.1, 1, 5])
    if pick.random() < 0.3:  # many ties
        logits, uncond = logits.round(), uncond.round()
    if pick.random() < 0.3:
        masked = torch.rand(logits.shape, generator=generator) < 0.5
        masked[..., pick.randrange(vocabulary)] = False
        logits = logits.masked_fill(masked, -INF)
    settings = {
        "guidance": pick.choice([0.0, 1.5, 4.0, pick.random()]),
        "temperature": pick.choice([0.0, 1.0, 1.0, 0.01, 0.7, 3.0, 1e6]),
        "top_k": pick.choice([0, 1, vocabulary, 2 * vocabulary, 1 + pick.randrange(vocabulary)]),
        "top_p": pick.choice([1.0, 0.95, pick.random() or 1.0, 1e-12]),
        "position": pick.choice([0, 31, 2**31 - 3, 2**32 - 5, 2**40]),
    }
    seeds = torch.tensor([pick.randrange(-(2**63), 2**63) for _ in range(batch)])
    return {"logits": logits.to(dtype), "uncond": uncond.to(dtype), "seeds": seeds} | settings


def hard_rows(vocabulary: int = 40) -> Tensor:
    """``[1, rows, V]`` fp32 logits, each row of which breaks something that is written carelessly."""
    i = torch.arange(vocabulary, dtype=torch.float32)
    one = torch.full((vocabulary,), -INF)
    one[vocabulary // 3] = -5.0
    tiny, zeros = torch.full((vocabulary,), 1e-45), torch.zeros(vocabulary)
    rows = {
        "all equal": torch.full((vocabulary,), 3.25),
        "one finite": one,
        "the whole range": torch.linspace(-1, 1, vocabulary) * 3.4028234663852886e38,
        "all at the lower end": torch.full((vocabulary,), -3.4028234663852886e38),
        "denormals": torch.where(i % 2 == 0, tiny, -tiny),
        "zeros of both signs": torch.where(i % 2 == 0, zeros, -zeros),
        "zero the largest": torch.where(i % 3 == 0, -zeros, -i),
        "pairs": (i // 2).flip(0) / 4,
        "two steps": torch.where(i < 5, 1.0, 0.0),
        "neighbours in fp32": torch.full((vocabulary,), 1.0).nextafter(torch.where(i % 2 == 0, 2.0, 0.0)),
        "at the lowest weight": -(i % 4) / 4 - 20.5,
    }
    return torch.stack(list(rows.values()))[None]


def exact_probabilities(guided: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Of guided logits ``[..., V]``: each code's probability in float64, by sorting; and for each row how near to p
    comes the sum of one code more or less: nearer than rounding, and the row may as well keep the other set."""
    x = guided.double() / temperature
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.sort(descending=True).values[..., top_k - 1, None], -INF)
    p = x.softmax(-1)
    margin = p.new_full(p.shape[:-1], INF)
    if top_p < 1:
        values, order = p.sort(descending=True)
        reached = values.cumsum(-1)
        last = (reached < top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        margin = (reached - top_p).abs().amin(-1)
        p = p.where(p >= values.gather(-1, last), 0)
        p = p / p.sum(-1, keepdim=True)
    return p, margin
