"""The same transformer as a next-token model: one code at a time, as audio language models run.

All ways have keys and values in memory allocated once and modulations computed once per sample: `Plain`, as good as
plain PyTorch gets, `Graphed`, the same with a CUDA graph for the tokens, and `Fused`, on this library's kernels.
Guidance is as in AAR: every token runs twice.

The weights are those of an AAR; only the table of positions is repeated where a sequence is longer. Quality is not
compared, only speed: such a model would have to be trained.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import aar_kernels as ak
from aar_kernels.graph import Graph

from ..models import AAR, generation
from .plain_aar import PlainAAR, head_factor, modulate, queries_keys_values

TOP_K, TOP_P = 200, 0.95


class NextToken:
    """What all have in common: ``length`` tokens, each embedded from the code before it."""

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

    def step(self, position: int, codes: Tensor | None, *, cfg: float) -> Tensor:
        """The next codes ``[B]``."""
        cond, uncond = self.logits(position, codes).chunk(2)
        return self._sample(position, cond, uncond, cfg)

    def generate(self, condition: Tensor, *, cfg: float = 4.0, seed: int = 0) -> Tensor:
        """Codes ``[B, length]``."""
        self.begin(condition, seed)
        codes: list[Tensor] = []
        for position in range(self.length):
            codes.append(self.step(position, codes[-1] if codes else None, cfg=cfg))
        return torch.stack(codes, dim=1)


def at(table: Tensor, position: int | Tensor) -> Tensor:
    """The row at a position that the host knows, or that is ``[1]`` int64 on the device."""
    return table[position] if isinstance(position, int) else table.index_select(0, position)[0]


class Plain(NextToken):
    """Plain PyTorch."""

    @torch.no_grad()
    def __init__(self, model: AAR, length: int):
        super().__init__(model, length)
        self.biases = [block.qkv_bias for block in model.blocks]
        self.factors = [head_factor(block) for block in model.blocks]

    def _begin(self) -> None:
        model, config, batch = self.model, self.model.config, len(self.embedding)
        generator = torch.Generator(self.embedding.device).manual_seed(self.seed)
        self.noise = model.position.new_empty(self.length, batch // 2, min(TOP_K, config.codebook_size)).float()
        self.noise.exponential_(generator=generator)
        self.modulations = generation.modulations_of(model, self.embedding)
        shape = (batch, config.heads, self.length, config.width // config.heads)
        self.keys, self.values = ([model.position.new_zeros(shape) for _ in model.blocks] for _ in range(2))

    def caches(self) -> list[Tensor]:
        return [*self.keys, *self.values]

    def _logits(self, position: int | Tensor, x: Tensor) -> Tensor:
        x, eps = x[:, None], self.model.config.norm_eps
        for i, block in enumerate(self.model.blocks):
            gate1, gate2, scale1, scale2, shift1, shift2 = self.modulations[i][:, None].chunk(6, dim=-1)
            x = x + gate1 * self._attend(i, position, modulate(x, scale1, shift1, eps))
            x = x + gate2 * block.feed_forward(modulate(x, scale2, shift2, eps))
        return self.model.head(modulate(x, *self.modulations[-1][:, None].chunk(2, dim=-1), eps))[:, 0]

    def _attend(self, i: int, position: int | Tensor, x: Tensor) -> Tensor:
        block, keys, values = self.model.blocks[i], self.keys[i], self.values[i]
        q, k, v = queries_keys_values(block, x, self.biases[i], self.factors[i])
        mask = None
        if isinstance(position, int):
            keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
            keys, values = keys[:, :, : position + 1], values[:, :, : position + 1]
        else:
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            mask = torch.arange(self.length, device=x.device)[None] <= position
        out = F.scaled_dot_product_attention(q, keys, values, mask, scale=block.softmax_scale)
        return block.proj(out.transpose(1, 2).flatten(2))

    def _sample(self, position: int | Tensor, cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
        """Sorts the `TOP_K` largest alone. The draw is that of `torch.multinomial`, its noise made beforehand."""
        guided = ((1 + cfg) * cond - cfg * uncond).float()
        values, order = guided.topk(self.noise.shape[-1])
        probabilities = values.softmax(dim=-1)
        probabilities = probabilities.where(probabilities.cumsum(dim=-1) - probabilities < TOP_P, 0)
        drawn = (probabilities / at(self.noise, position)).argmax(dim=-1, keepdim=True)
        return order.gather(-1, drawn)[:, 0]


class Graphed(Plain):
    """`Plain` with the position on the device: one CUDA graph serves all tokens (not yet run on hardware).

    Keys are then always as many as the sequence has tokens, and later ones masked: what the shapes of a graph cost.
    On a CPU the same is computed without a graph.
    """

    @torch.no_grad()
    def __init__(self, model: AAR, length: int):
        super().__init__(model, length)
        self._graph, self._cfg, self._state = None, 0.0, []

    def _begin(self) -> None:
        """What a graph reads stays where it is while batches are of one size."""
        super()._begin()
        state = [self.embedding, self.noise, *self.modulations, *self.keys, *self.values]
        if not self._state or self._state[0].shape != state[0].shape:
            self._graph, self._state = None, state
            return
        for kept, new in zip(self._state, state, strict=True):
            kept.copy_(new)
        blocks = len(self.model.blocks)
        self.embedding, self.noise, *rest = self._state
        self.modulations, self.keys, self.values = rest[: -2 * blocks], rest[-2 * blocks : -blocks], rest[-blocks:]

    @torch.no_grad()
    def logits(self, position: int | Tensor, codes: Tensor | None) -> Tensor:
        position, codes = self._on_device(position, codes)
        first = self.embedding + self.model.start[0] + self.positions[0]
        later = (self.words[codes] + at(self.positions, position)).repeat(2, 1)
        return self._logits(position, torch.where(position == 0, first, later))

    def step(self, position: int | Tensor, codes: Tensor | None, *, cfg: float) -> Tensor:
        inputs, run = self._on_device(position, codes), partial(super().step, cfg=cfg)
        if not self._captures():
            return run(*inputs)
        if self._graph is None or self._cfg != cfg:
            self._graph, self._cfg = Graph(run, inputs), cfg
        return self._graph(*inputs)

    def _captures(self) -> bool:
        return self.embedding.is_cuda

    def _on_device(self, position: int | Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor]:
        device = self.embedding.device
        if codes is None:  # which the first token does not look at
            codes = torch.zeros(len(self.embedding) // 2, dtype=torch.int64, device=device)
        return torch.full((1,), position, device=device) if isinstance(position, int) else position, codes


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

    def _sample(self, position: int, cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
        options = {"guidance": cfg, "top_k": TOP_K, "top_p": TOP_P, "position": position}
        seeds = self.seed + torch.arange(len(cond), device=cond.device)
        return ak.sampling.sample(cond[:, None], uncond=uncond[:, None], seeds=seeds, **options)[:, 0]
