"""Block-causal scale attention against plain PyTorch, torch.compile of it, and what PyTorch offers for masks: SDPA with
a dense one, FlexAttention with a block mask. The cached step against SDPA with a cache that grows by concatenation."""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..attention import ScaleCache, reference, scale_attention, scale_attention_step
from ..schedule import ScaleSchedule
from .measure import Case, Variant

PUBLISHED = ScaleSchedule.quadratic(16, 75)
HEADS, HEAD_DIM = 16, 64
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(options: Namespace) -> Iterator[Case]:
    for dtype in filter(_is_fast, (torch.float32, torch.bfloat16)):
        for cosine in (True, False):
            for batch in options.batch:
                torch.manual_seed(0)
                inputs = torch.randn(3, batch, PUBLISHED.total, HEADS, HEAD_DIM, dtype=dtype).unbind()
                scale = torch.linspace(1, 5, HEADS) if cosine else None
                yield _forward(inputs, scale, options)
                yield _training(inputs, scale, options)
                yield _sampling(inputs, scale)


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether another backend than the reference takes it on this machine."""
    return dispatch.select("attention_forward", torch.empty(0, dtype=dtype), dim=HEAD_DIM) != "reference"


def _forward(inputs: tuple[Tensor, ...], scale: Tensor | None, options: Namespace) -> Case:
    def run(attention: Attention) -> Variant:
        def go() -> Tensor:
            with torch.no_grad():
                return attention(*inputs)

        return go

    variants = {name: run(attention) for name, attention in _variants(scale, options, training=False).items()}
    return _case("forward", inputs, scale, variants, 1)


def _training(inputs: tuple[Tensor, ...], scale: Tensor | None, options: Namespace) -> Case:
    """Forward and backward; the result is every gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    weight = torch.linspace(-9, 9, inputs[0].numel()).sin().view(inputs[0].shape).to(inputs[0].dtype)

    def run(attention: Attention) -> Variant:
        return lambda: torch.stack(torch.autograd.grad(attention(*leaves), leaves, weight))

    variants = {name: run(attention) for name, attention in _variants(scale, options, training=True).items()}
    # The backward pass has five products where the forward pass has two.
    return _case("training step", inputs, scale, variants, 3.5, weight)


def _sampling(inputs: tuple[Tensor, ...], scale: Tensor | None) -> Case:
    """All scales of one sample, one after the other."""
    batch, dtype = len(inputs[0]), inputs[0].dtype
    cache = ScaleCache.empty(batch, PUBLISHED.total, HEADS, HEAD_DIM, dtype=dtype)

    def ours(backend: str | None) -> Variant:
        def run() -> Tensor:
            cache.reset()
            parts = []
            with torch.no_grad():
                for part in PUBLISHED.slices():
                    new = (x[:, part] for x in inputs)
                    parts.append(scale_attention_step(*new, cache, head_log_scale=scale, backend=backend))
            return torch.cat(parts, dim=1)

        return run

    def concatenated() -> Tensor:
        parts, keys, values = [], [], []
        with torch.no_grad():
            for part in PUBLISHED.slices():
                q, k, v, factor = _prepared(*(x[:, part] for x in inputs), scale)
                keys, values = [torch.cat([*keys, k], dim=2)], [torch.cat([*values, v], dim=2)]
                parts.append(F.scaled_dot_product_attention(q, keys[0], values[0], scale=factor).transpose(1, 2))
        return torch.cat(parts, dim=1)

    return _case("cached steps", inputs, scale, {
        "ours": ours(None), "eager": ours("reference"), "SDPA, concatenated": concatenated,
    }, 1)  # fmt: skip


def _variants(scale: Tensor | None, options: Namespace, *, training: bool) -> dict[str, Attention]:
    def run(backend: str | None) -> Attention:
        return lambda q, k, v: scale_attention(q, k, v, PUBLISHED, head_log_scale=scale, backend=backend)

    mask = PUBLISHED.mask()

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v, factor = _prepared(q, k, v, scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=factor).transpose(1, 2)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v, factor = _prepared(q, k, v, scale)
        return _flex()(q, k, v, block_mask=_block_mask(), scale=factor).transpose(1, 2)

    variants = {"ours": run(None), "eager": run("reference"), "SDPA dense mask": sdpa}
    if not options.no_compile:
        variants["compile"] = _compiled(scale is not None, scale)
        if not training:  # FlexAttention has no backward pass on CPUs
            variants["FlexAttention"] = flex
    return variants


def _prepared(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """What a user would give PyTorch: heads before tokens, rows normalised, and the factor of the logits."""
    if scale is not None:
        gain = scale.clamp(max=reference.LARGEST_LOG_SCALE).exp().to(q.dtype)
        q, k = F.normalize(q, dim=-1) * gain[:, None], F.normalize(k, dim=-1)
    factor = 1 / math.sqrt(HEAD_DIM) if scale is None else 1.0
    return *(x.transpose(1, 2) for x in (q, k, v)), factor


@functools.cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(PUBLISHED.mask_mod, None, None, PUBLISHED.total, PUBLISHED.total, device="cpu")


_COMPILED: dict[bool, Callable] = {}


def _compiled(cosine: bool, scale: Tensor | None) -> Attention:
    """torch.compile of the reference, once for all batch sizes."""
    if cosine not in _COMPILED:
        _COMPILED[cosine] = torch.compile(
            lambda q, k, v, scale: scale_attention(q, k, v, PUBLISHED, head_log_scale=scale, backend="reference"),
            dynamic=True,
        )
    return lambda q, k, v: _COMPILED[cosine](q, k, v, scale)


def _case(
    name: str, inputs: tuple[Tensor, ...], scale: Tensor | None, variants: dict[str, Variant], passes: float,
    weight: Tensor | None = None,
) -> Case:  # fmt: skip
    batch, dtype = len(inputs[0]), inputs[0].dtype
    flops = int(passes * 4 * PUBLISHED.attention_pairs * HEAD_DIM * HEADS * batch)
    tensors = 4 if weight is None else 12  # q, k, v, out; and again with out's gradient, and three gradients
    kind = "plain" if scale is None else "cosine"
    shape = f"batch {batch}, {kind}, {str(dtype)[6:]}"
    check = functools.partial(_differ, inputs, scale, variants, weight)
    return Case(name, shape, variants, check, flops, tensors * inputs[0].nbytes)


def _differ(
    inputs: tuple[Tensor, ...], scale: Tensor | None, variants: dict[str, Variant], weight: Tensor | None
) -> str:
    """Against the float64 reference, with the rule of the tests: twice eager's error, and one rounding."""
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    double = None if scale is None else scale.double()
    exact = scale_attention(*exact_inputs, PUBLISHED, head_log_scale=double, backend="reference")
    if weight is not None:
        exact = torch.stack(torch.autograd.grad(exact, exact_inputs, weight.double()))
    error = {name: (run() - exact).abs().max().item() for name, run in variants.items()}
    bound = 2 * (error["eager"] + torch.finfo(inputs[0].dtype).eps * exact.abs().max().item())
    return "; ".join(
        f"{name}: off by {e:.1e}, allowed {bound:.1e}" for name, e in error.items() if not e <= bound
    )
