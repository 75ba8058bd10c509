"""Sampling of a whole clip's tokens against what a user writes in PyTorch, and torch.compile of it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..sampling import sample
from ..sampling.common import factors
from ..sampling.reference import guided, kept_weights
from . import shapes
from .measure import Case

GUIDANCE, TOP_K, TOP_P = 4.0, 200, 0.95


@dataclass(frozen=True)
class Sizes:
    batch: int = 8
    length: int = 455
    codes: int = 1024


def cases(options: Namespace) -> Iterator[Case]:
    if torch.float32 not in shapes.dtypes(options, [torch.float32]):
        return
    compiled = None if options.no_compile else torch.compile(_draw, dynamic=True)
    for sizes in _sizes(options):
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        logits, uncond = 2 * torch.randn(2, *asdict(sizes).values(), generator=generator)
        for top_k, top_p in ((TOP_K, TOP_P), (0, 1.0)):
            yield _case(logits, uncond, sizes, min(top_k, sizes.codes // 2), top_p, compiled)


def _sizes(options: Namespace) -> list[Sizes]:
    if options.shapes == "sweep":
        return shapes.sweep(options, Sizes(batch=2), {"batch": options.batch, "codes": (512, 1024, 2048, 4096)})
    others = {} if options.shapes == "paper" else {"length": 50, "codes": 128}
    return [Sizes(batch, **others) for batch in options.batch]


def _case(
    logits: Tensor, uncond: Tensor, sizes: Sizes, top_k: int, top_p: float, compiled: Callable | None
) -> Case:  # fmt: skip
    settings = {"guidance": GUIDANCE, "top_k": top_k, "top_p": top_p, "seeds": torch.arange(len(logits))}
    arguments = logits, uncond, GUIDANCE, top_k, top_p
    variants = {
        "ours": lambda: sample(logits, uncond=uncond, **settings),
        "reference": lambda: sample(logits, uncond=uncond, **settings, backend="reference"),
        "eager": lambda: _draw(*arguments),
    }
    if top_k:
        variants["eager, among top k"] = lambda: _draw_among_top_k(*arguments)
    if compiled:
        variants["compile"] = lambda: compiled(*arguments)

    def check() -> str:
        if not torch.equal(variants["ours"](), variants["reference"]()):
            return "ours draws other codes than the reference"
        conditional, unconditional, scale = factors(GUIDANCE, 1.0)
        weights = kept_weights(guided(logits, uncond, conditional, unconditional), scale, top_k, top_p)
        theirs = _filtered(*arguments).softmax(-1)
        distance = (weights / weights.sum(-1, keepdim=True) - theirs).abs().sum(-1) / 2
        other = (distance > 1e-5).float().mean().item()
        # Where a nucleus ends within rounding of p, they may keep one code more or less.
        return f"{other:.1%} of the tokens have another distribution than eager's" if other > 0.01 else ""

    name = "sample, no filter" if top_k == 0 else f"sample, k {top_k}, p {top_p}"
    read = 4 * (logits.numel() + uncond.numel()) + 8 * sizes.batch * sizes.length
    # Three operations of guidance a code, and an exponential of those that are left: bytes are the bound.
    shape = f"batch {sizes.batch}" + shapes.others(sizes, Sizes())
    return Case(name, shape, variants, check, flops=3 * logits.numel(), bytes=read, sizes=asdict(sizes))


def _filtered(logits: Tensor, uncond: Tensor, guidance: float, top_k: int, top_p: float) -> Tensor:
    """What a user writes: filtered codes at -inf (as generation in the transformers library has it)."""
    x = (1 + guidance) * logits - guidance * uncond
    if top_k:
        x = x.masked_fill(x < x.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, order = x.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        x = x.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return x


def _draw(logits: Tensor, uncond: Tensor, guidance: float, top_k: int, top_p: float) -> Tensor:
    probabilities = _filtered(logits, uncond, guidance, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities.flatten(0, 1), 1).view(logits.shape[:2])


def _draw_among_top_k(logits: Tensor, uncond: Tensor, guidance: float, top_k: int, top_p: float) -> Tensor:
    """As `_draw` where no logits are equal, with all that follows top-k on its sorted result alone."""
    ordered, order = ((1 + guidance) * logits - guidance * uncond).topk(top_k)
    probabilities = ordered.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    probabilities = probabilities.masked_fill(beyond, 0)
    place = torch.multinomial(probabilities.flatten(0, 1), 1).view(*logits.shape[:2], 1)
    return order.gather(-1, place)[..., 0]
