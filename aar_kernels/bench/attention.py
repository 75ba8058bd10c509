"""Block-causal scale attention against plain PyTorch, torch.compile of it, and what PyTorch offers for masks: SDPA with
a dense one, FlexAttention with a block mask. The cached step against SDPA with a cache that grows by concatenation."""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..attention import ScaleCache, reference, scale_attention, scale_attention_step
from ..schedule import ScaleSchedule
from . import shapes
from .measure import Case, Variant

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """The published transformer's, unless said."""

    batch: int = 8
    length: int = 75  # of the finest scale
    scales: int = 16
    heads: int = 16
    head_dim: int = 64

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.quadratic(self.scales, self.length)


@dataclass(frozen=True)
class Problem:
    """One call's tensors, and how a case made of it is named."""

    sizes: Sizes
    inputs: tuple[Tensor, ...]
    scale: Tensor | None  # of each head, for cosine attention

    @property
    def kind(self) -> str:
        return "plain" if self.scale is None else "cosine"

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    @property
    def schedule(self) -> ScaleSchedule:
        return self.sizes.schedule

    @property
    def name(self) -> str:
        return f"batch {self.sizes.batch}, {self.kind}, {str(self.dtype)[6:]}" + shapes.others(self.sizes, Sizes())


def cases(options: Namespace) -> Iterator[Case]:
    asked = shapes.dtypes(options, (torch.float32, torch.bfloat16), also=[torch.float16])
    for same, group in groupby(_sizes(options), lambda sizes: replace(sizes, batch=0)):
        torch._dynamo.reset()  # what was compiled for another schedule is of no more use
        _COMPILED.clear()
        batches = [sizes.batch for sizes in group]
        for dtype in asked:
            if not _is_fast(dtype, same.head_dim):
                continue
            for cosine in (True, False):
                for batch in batches:
                    torch.manual_seed(0)
                    sizes = replace(same, batch=batch)
                    shape = (3, batch, sizes.schedule.total, sizes.heads, sizes.head_dim)
                    scale = torch.linspace(1, 5, sizes.heads) if cosine else None
                    problem = Problem(sizes, torch.randn(shape, dtype=dtype).unbind(), scale)
                    yield _forward(problem, options)
                    yield _training(problem, options)
                    yield _sampling(problem)


def _sizes(options: Namespace) -> list[Sizes]:
    if options.shapes == "sweep":
        return shapes.sweep(options, Sizes(batch=2), {
            "batch": options.batch, "length": (25, 75, 150), "scales": (4, 8, 16),
        })  # fmt: skip
    others = {} if options.shapes == "paper" else {"length": 25, "scales": 6, "heads": 2, "head_dim": 32}
    return [Sizes(batch, **others) for batch in options.batch]


def _is_fast(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether another backend than the reference takes it on this machine."""
    return dispatch.select("attention_forward", torch.empty(0, dtype=dtype), dim=head_dim) != "reference"


def _forward(problem: Problem, options: Namespace) -> Case:
    def run(attention: Attention) -> Variant:
        def go() -> Tensor:
            with torch.no_grad():
                return attention(*problem.inputs)

        return go

    variants = {name: run(attention) for name, attention in _variants(problem, options, training=False).items()}
    return _case("forward", problem, variants, 1)


def _training(problem: Problem, options: Namespace) -> Case:
    """Forward and backward; the result is every gradient."""
    leaves = [x.clone().requires_grad_() for x in problem.inputs]
    like = problem.inputs[0]
    weight = torch.linspace(-9, 9, like.numel()).sin().view(like.shape).to(like.dtype)

    def run(attention: Attention) -> Variant:
        return lambda: torch.stack(torch.autograd.grad(attention(*leaves), leaves, weight))

    variants = {name: run(attention) for name, attention in _variants(problem, options, training=True).items()}
    # The backward pass has five products where the forward pass has two.
    return _case("training step", problem, variants, 3.5, weight)


def _sampling(problem: Problem) -> Case:
    """All scales of one sample, one after the other."""
    sizes, inputs, scale = problem.sizes, problem.inputs, problem.scale
    parts = problem.schedule.slices()
    cache = ScaleCache.empty(sizes.batch, problem.schedule.total, sizes.heads, sizes.head_dim, dtype=problem.dtype)

    def ours(backend: str | None) -> Variant:
        def run() -> Tensor:
            cache.reset()
            results = []
            with torch.no_grad():
                for part in parts:
                    new = (x[:, part] for x in inputs)
                    results.append(scale_attention_step(*new, cache, head_log_scale=scale, backend=backend))
            return torch.cat(results, dim=1)

        return run

    def concatenated() -> Tensor:
        results, keys, values = [], [], []
        with torch.no_grad():
            for part in parts:
                q, k, v, factor = _prepared(*(x[:, part] for x in inputs), scale)
                keys, values = [torch.cat([*keys, k], dim=2)], [torch.cat([*values, v], dim=2)]
                results.append(F.scaled_dot_product_attention(q, keys[0], values[0], scale=factor).transpose(1, 2))
        return torch.cat(results, dim=1)

    return _case("cached steps", problem, {
        "ours": ours(None), "eager": ours("reference"), "SDPA, concatenated": concatenated,
    }, 1)  # fmt: skip


def _variants(problem: Problem, options: Namespace, *, training: bool) -> dict[str, Attention]:
    schedule, scale = problem.schedule, problem.scale

    def run(backend: str | None) -> Attention:
        return lambda q, k, v: scale_attention(q, k, v, schedule, head_log_scale=scale, backend=backend)

    mask = schedule.mask()

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v, factor = _prepared(q, k, v, scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=factor).transpose(1, 2)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v, factor = _prepared(q, k, v, scale)
        return _flex()(q, k, v, block_mask=_block_mask(schedule, q.device), scale=factor).transpose(1, 2)

    variants = {"ours": run(None), "eager": run("reference"), "SDPA dense mask": sdpa}
    if not options.no_compile:
        variants["compile"] = _compiled(schedule, scale)
        if not training or mask.is_cuda:  # FlexAttention has no backward pass on CPUs
            variants["FlexAttention"] = flex
    return variants


def _prepared(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """What a user would give PyTorch: heads before tokens, rows normalised, and the factor of the logits."""
    if scale is not None:
        gain = scale.clamp(max=reference.LARGEST_LOG_SCALE).exp().to(q.dtype)
        q, k = F.normalize(q, dim=-1) * gain[:, None], F.normalize(k, dim=-1)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else 1.0
    return *(x.transpose(1, 2) for x in (q, k, v)), factor


@functools.cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _block_mask(schedule: ScaleSchedule, device: torch.device):
    return schedule.to_block_mask(device=device)


_COMPILED: dict[bool, Callable] = {}


def _compiled(schedule: ScaleSchedule, scale: Tensor | None) -> Attention:
    """torch.compile of the reference, once for all batch sizes."""
    cosine = scale is not None
    if cosine not in _COMPILED:
        _COMPILED[cosine] = torch.compile(
            lambda q, k, v, scale: scale_attention(q, k, v, schedule, head_log_scale=scale, backend="reference"),
            dynamic=True,
        )
    compiled = _COMPILED[cosine]
    return lambda q, k, v: compiled(q, k, v, scale)


def _case(
    name: str, problem: Problem, variants: dict[str, Variant], passes: float, weight: Tensor | None = None
) -> Case:  # fmt: skip
    sizes = problem.sizes
    flops = int(passes * 4 * problem.schedule.attention_pairs * sizes.head_dim * sizes.heads * sizes.batch)
    tensors = 4 if weight is None else 12  # q, k, v, out; and again with out's gradient, and three gradients
    check = functools.partial(_differ, problem, variants, weight)
    about = asdict(sizes) | {"kind": problem.kind, "dtype": str(problem.dtype)[6:]}
    return Case(name, problem.name, variants, check, flops, tensors * problem.inputs[0].nbytes, about)


def _differ(problem: Problem, variants: dict[str, Variant], weight: Tensor | None) -> str:
    """Against the float64 reference, with the rule of the tests: twice eager's error, and one rounding."""
    exact_inputs = [x.double().requires_grad_() for x in problem.inputs]
    double = None if problem.scale is None else problem.scale.double()
    exact = scale_attention(*exact_inputs, problem.schedule, head_log_scale=double, backend="reference")
    if weight is not None:
        exact = torch.stack(torch.autograd.grad(exact, exact_inputs, weight.double()))
    error = {name: (run() - exact).abs().max().item() for name, run in variants.items()}
    bound = 2 * (error["eager"] + torch.finfo(problem.dtype).eps * exact.abs().max().item())
    return "; ".join(
        f"{name}: off by {e:.1e}, allowed {bound:.1e}" for name, e in error.items() if not e <= bound
    )
