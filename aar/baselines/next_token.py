"""The same transformer as a next-token model: one code at a time, as audio language models run.

Two ways, both with keys and values in memory allocated once and modulations computed once per sample: `Plain`, as good
as plain PyTorch gets, and `Fused`, on this library's kernels. Guidance is as in AAR: every token runs twice.

The weights are those of an AAR; only the table of positions is repeated where a sequence is longer. Quality is not
compared, only speed: such a model would have to be trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import aar_kernels as ak

from ..models import AAR, generation
from .plain_aar import PlainAAR, head_factor, modulate, queries_keys_values


class NextToken:
    """What both have in common: ``length`` tokens, each embedded from the code before it."""

    def __init__(self, model: AAR, length: int):
        self.model, self.length = model, length
        with torch.no_grad():
            self.words = model.word(model.quantizer.codebooks[0])  # [codebook_size, C], a table as such models have
        self.positions = model.position.detach().repeat(-(-length // model.schedule.total), 1)[:length]

    @torch.no_grad()
    def begin(self, condition: Tensor, seed: int = 0) -> None:
        """Prepares the caches for a batch; the unconditional items come after those of ``condition[B, ...]``."""
        condition = torch.cat([condition, self.model.null_condition.expand_as(condition)])
        self.embedding, self.seed = self.model.embed_condition(condition), seed
        self._begin()

    def fill(self) -> None:
        """Fills the caches with noise, for timing a token in the middle of a sequence."""
        for keys_or_values in self.caches():
            keys_or_values.normal_()

    @torch.no_grad()
    def logits(self, position: int, codes: Tensor | None) -> Tensor:
        """``[2 B, codebook_size]`` from the codes ``[B]`` of the token before, None at the first."""
        if codes is None:
            x = self.embedding + self.model.start[0] + self.positions[0]
        else:
            x = (self.words[codes] + self.positions[position]).repeat(2, 1)
        return self._logits(position, x)

    @torch.no_grad()
    def causal_logits(self, model: AAR, condition: Tensor, codes: Tensor) -> Tensor:
        """``[2 B, n, codebook_size]`` of the first n tokens at once, without a cache: what `logits` must equal.

        Args:
            model: as its own, or rounded, or in another dtype.
        """
        n, dtype = codes.shape[1], model.position.dtype
        condition = torch.cat([condition.to(dtype), model.null_condition.expand_as(condition)])
        embedding, positions = model.embed_condition(condition), self.positions.to(dtype)
        later = (self.words[codes[:, :-1]].to(dtype) + positions[1:n]).repeat(2, 1, 1)
        x = torch.cat([(embedding + model.start[0] + positions[0])[:, None], later], dim=1)
        bias = x.new_full((n, n), -torch.inf).triu(1)
        return PlainAAR(model).logits(x, embedding, [None] * len(model.blocks), bias)[0]

    def step(self, position: int, codes: Tensor | None, *, cfg: float, top_k: int = 200, top_p: float = 0.95) -> Tensor:
        """The next codes ``[B]``."""
        cond, uncond = self.logits(position, codes).chunk(2)
        return self._sample(position, cond, uncond, cfg, top_k, top_p)

    def generate(self, condition: Tensor, *, cfg: float = 4.0, seed: int = 0) -> Tensor:
        """Codes ``[B, length]``."""
        self.begin(condition, seed)
        codes: list[Tensor] = []
        for position in range(self.length):
            codes.append(self.step(position, codes[-1] if codes else None, cfg=cfg))
        return torch.stack(codes, dim=1)


class Plain(NextToken):
    """Plain PyTorch."""

    def _begin(self) -> None:
        model, config = self.model, self.model.config
        batch, adaptive = len(self.embedding), F.silu(self.embedding)
        self.generator = torch.Generator(self.embedding.device).manual_seed(self.seed)
        self.modulations = [block.modulation(adaptive)[:, None].chunk(6, dim=-1) for block in model.blocks]
        self.head_modulation = model.head_modulation(adaptive)[:, None].chunk(2, dim=-1)
        self.biases = [block.qkv_bias for block in model.blocks]
        self.factors = [head_factor(block) for block in model.blocks]
        shape = (batch, config.heads, self.length, config.width // config.heads)
        self.keys, self.values = ([model.position.new_empty(shape) for _ in model.blocks] for _ in range(2))

    def caches(self) -> list[Tensor]:
        return [*self.keys, *self.values]

    def _logits(self, position: int, x: Tensor) -> Tensor:
        x, eps = x[:, None], self.model.config.norm_eps
        for i, block in enumerate(self.model.blocks):
            gate1, gate2, scale1, scale2, shift1, shift2 = self.modulations[i]
            x = x + gate1 * self._attend(i, position, modulate(x, scale1, shift1, eps))
            x = x + gate2 * block.feed_forward(modulate(x, scale2, shift2, eps))
        return self.model.head(modulate(x, *self.head_modulation, eps))[:, 0]

    def _attend(self, i: int, position: int, x: Tensor) -> Tensor:
        block, keys, values = self.model.blocks[i], self.keys[i], self.values[i]
        q, k, v = queries_keys_values(block, x, self.biases[i], self.factors[i])
        keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
        keys, values = keys[:, :, : position + 1], values[:, :, : position + 1]
        out = F.scaled_dot_product_attention(q, keys, values, scale=block.softmax_scale)
        return block.proj(out.transpose(1, 2).flatten(2))

    def _sample(self, position: int, cond: Tensor, uncond: Tensor, cfg: float, top_k: int, top_p: float) -> Tensor:
        """Sorts the `top_k` largest alone."""
        values, order = ((1 + cfg) * cond - cfg * uncond).topk(min(top_k, cond.shape[-1]))
        probabilities = values.softmax(dim=-1)
        probabilities = probabilities.where(probabilities.cumsum(dim=-1) - probabilities < top_p, 0)
        return order.gather(-1, torch.multinomial(probabilities, 1, generator=self.generator))[:, 0]


class Fused(NextToken):
    """The layers, caches and sampling of `aar.models.generation`, with weights kept in ``dtype``."""

    def __init__(self, model: AAR, length: int, dtype: torch.dtype = torch.float32):
        super().__init__(model, length)
        self.engine = generation.engine_of(model, dtype)

    def _begin(self) -> None:
        self.modulations = generation.modulations_of(self.model, self.embedding)
        self.scale_caches = self.engine.caches(len(self.embedding), self.length).of_blocks()

    def caches(self) -> list[Tensor]:
        return [tensor for cache in self.scale_caches for tensor in (cache.k, cache.v)]

    def _logits(self, position: int, x: Tensor) -> Tensor:
        for cache in self.scale_caches:
            cache.length = position
        return self.engine.head(self.engine.blocks(x[:, None], self.modulations, self.scale_caches))[:, 0]

    def _sample(self, position: int, cond: Tensor, uncond: Tensor, cfg: float, top_k: int, top_p: float) -> Tensor:
        options = {"guidance": cfg, "top_k": top_k, "top_p": top_p, "position": position}
        seeds = self.seed + torch.arange(len(cond), device=cond.device)
        return ak.sampling.sample(cond[:, None], uncond=uncond[:, None], seeds=seeds, **options)[:, 0]
