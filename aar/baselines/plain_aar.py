"""AAR in plain PyTorch, run as the public code of its family runs it (VAR, arXiv 2404.02905): the baseline.

Dense float mask, normalised queries and keys outside of `F.scaled_dot_product_attention`, caches that are concatenated,
modulations computed in every block at every scale, both halves of the guidance at every scale, and sampling by sorting.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from aar_kernels.attention.reference import LARGEST_LOG_SCALE

from ..models import AAR
from ..models.aar import Block

Cache = tuple[Tensor, Tensor] | None  # keys and values, [B, heads, length, head_dim]


class PlainAAR:
    """The same function as ``model``, of the same parameters.

    Args:
        compiled: run the transformer through torch.compile, with dynamic shapes.
        autocast: run it under autocast to this dtype.
    """

    def __init__(self, model: AAR, *, compiled: bool = False, autocast: torch.dtype | None = None):
        self.model, self.autocast = model, autocast
        self.bias = model.position.new_zeros(model.schedule.total, model.schedule.total)
        self.bias.masked_fill_(~model.schedule.mask().to(self.bias.device), -torch.inf)
        self.run = torch.compile(self.logits, dynamic=True) if compiled else self.logits

    def _autocast(self, x: Tensor) -> AbstractContextManager:
        """The caller's, unless it was given."""
        return nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast)

    def forward(self, condition: Tensor, inputs: Tensor) -> Tensor:
        """Teacher-forced logits ``[B, total, codebook_size]``, as `AAR.forward` of inputs."""
        model = self.model
        embedding = model.embed_condition(condition)
        later = model.word(inputs) + model.places(1, model.schedule.num_scales)
        x = torch.cat([model.first_tokens(embedding), later], dim=1)
        with self._autocast(x):
            return self.logits(x, embedding, [None] * len(model.blocks), self.bias)[0]

    @torch.no_grad()
    def generate(
        self, condition: Tensor, *, cfg: float = 4.0, top_k: int = 200, top_p: float = 0.95, temperature: float = 1.0,
        seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """Codes ``[B, total]``, as `AAR.sample`; the random numbers are PyTorch's, so equal only at temperature 0."""
        model = self.model
        schedule, last = model.schedule, max(model.schedule.num_scales - 1, 1)
        generator = torch.Generator(condition.device).manual_seed(seed)
        embedding = model.embed_condition(torch.cat([condition, model.null_condition.expand_as(condition)]))
        x = model.first_tokens(embedding)
        f_hat = x.new_zeros(len(condition), schedule.length, model.config.latent_dim)
        caches: list[Cache] = [None] * len(model.blocks)
        codes = []
        for scale in range(schedule.num_scales):
            with self._autocast(x):
                logits, caches = self.run(x, embedding, caches, None)
            cond, uncond = logits.chunk(2)
            t = cfg * scale / last
            codes.append(sample((1 + t) * cond - t * uncond, top_k, top_p, temperature, generator))
            f_hat, inputs = model.quantizer.step(scale, f_hat, codes[-1], backend="reference")
            if scale < schedule.num_scales - 1:
                x = model.word(inputs) + model.places(scale + 1, scale + 2)
                x = torch.cat([x, x])
        return torch.cat(codes, dim=1)

    def logits(
        self, x: Tensor, embedding: Tensor, caches: list[Cache], bias: Tensor | None
    ) -> tuple[Tensor, list[Cache]]:
        """Logits of the tokens ``x[B, n, C]`` that come after those in the caches; and the caches with them."""
        model, eps = self.model, self.model.config.norm_eps
        adaptive = F.silu(embedding)[:, None]
        longer = []
        for block, cache in zip(model.blocks, caches, strict=True):
            gate1, gate2, scale1, scale2, shift1, shift2 = block.modulation(adaptive).chunk(6, dim=-1)
            y, cache = _attend(block, modulate(x, scale1, shift1, eps), cache, bias)
            x = x + gate1 * y
            x = x + gate2 * block.feed_forward(modulate(x, scale2, shift2, eps))
            longer.append(cache)
        y = modulate(x, *model.head_modulation(adaptive).chunk(2, dim=-1), eps)
        with torch.autocast(x.device.type, enabled=False):
            return model.head(y.to(model.head.weight.dtype)), longer


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def head_factor(block: Block) -> Tensor | float:
    """What cosine attention multiplies each head's logits by, ``[heads, 1, 1]``."""
    return 1.0 if block.log_scale is None else block.log_scale.clamp(max=LARGEST_LOG_SCALE).exp()[:, None, None]


def queries_keys_values(block: Block, x: Tensor, bias: Tensor, factor: Tensor | float) -> tuple[Tensor, ...]:
    """Each ``[B, heads, n, head_dim]``, from `Block.qkv_bias` and `head_factor`."""
    q, k, v = F.linear(x, block.qkv.weight, bias).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    if block.log_scale is not None:
        q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
    return q.to(v.dtype), k.to(v.dtype), v  # autocast normalises in fp32


def _attend(block: Block, x: Tensor, cache: Cache, bias: Tensor | None) -> tuple[Tensor, Cache]:
    q, k, v = queries_keys_values(block, x, block.qkv_bias, head_factor(block))
    if cache is not None:
        k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
    bias = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=block.softmax_scale)
    return block.proj(out.transpose(1, 2).flatten(2)), (k, v)


def sample(logits: Tensor, top_k: int, top_p: float, temperature: float, generator: torch.Generator) -> Tensor:
    """One code for each of ``logits[B, n, V]``: masks below the k-th, then below top-p of what is left, in turn."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        out[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    picks = torch.multinomial(logits.softmax(dim=-1).flatten(0, 1), 1, generator=generator)
    return picks.view(logits.shape[:2])
