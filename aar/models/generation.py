"""Sampling of an AAR: scale by scale, with a static cache, packed weights, and nothing computed twice.

What depends on the condition alone (the modulations of all blocks) is computed once per call; what depends on the
weights alone (their packing, and everything about the null condition's first scale) once per model. The first scale
has guidance 0, so its unconditional half is never run: later scales read its keys and values from that once.

Source: arXiv 2408.09027, section 3.2 and appendix; guidance grows from 0 at the first scale to `cfg` at the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import aar_kernels as ak
from aar_kernels.cache import DerivedCache
from aar_kernels.linear import linear, pack
from aar_kernels.modulation import gated_residual_modulate, layer_norm_modulate

from .aar import AAR, Block

__all__ = ["sample"]

Linear = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


@torch.no_grad()
def sample(
    model: AAR, condition: Tensor | None = None, *, num: int | None = None, cfg: float = 4.0, top_k: int = 200,
    top_p: float = 0.95, temperature: float = 1.0, seed: int | Sequence[int] | Tensor = 0,
    dtype: torch.dtype | None = None, scales_callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Samples codes ``[B, total]`` int64 of one window each.

    An item's codes depend on its condition and its seed alone, not on what it is batched with.

    Args:
        condition: ``[B, condition_dim]``; None for `num` unconditional items.
        cfg: guidance at the last scale; at scale s of S the logits are ``(1 + t) cond - t uncond`` with
            ``t = cfg * s / (S - 1)``. 0 for none. Unconditional items need none.
        top_k, top_p, temperature: filters of `aar_kernels.sampling.sample`; temperature 0 takes the likeliest code.
        seed: of the random numbers: one for each item (a list, or ``[B]`` int64 on the model's device, which costs no
            copy there), or one number, from which item i has ``seed + i``.
        dtype: in which weights are kept: torch.float32, or torch.bfloat16 or torch.int8 to read less memory
            (arithmetic stays fp32 on the CPU). The model's own unless given.
        scales_callback: called after each scale with its index, the reconstruction so far ``[B, T, latent_dim]``, and
            the scale's codes ``[B, lengths[scale]]``.

    Raises:
        ValueError: a condition of another width, cfg below 0, or a filter out of range.
        RuntimeError: NaN logits.
    """
    if not cfg >= 0:
        raise ValueError(f"cfg must be at least 0, got {cfg}")
    batch = _batch(condition, num)
    seeds = _seeds(seed, batch, model.position.device)
    guided = condition is not None and cfg > 0
    run = Run(model, dtype or model.position.dtype, model.conditions(condition, batch), guided)
    schedule, last = model.schedule, max(model.schedule.num_scales - 1, 1)
    f_hat = model.position.new_zeros(batch, schedule.length, model.config.latent_dim)
    inputs, codes = None, []
    for scale, start in enumerate(schedule.offsets[:-1]):
        logits, uncond = run.logits(scale, inputs)
        picks = ak.sampling.sample(
            logits, uncond=uncond, guidance=cfg * scale / last if guided else 0.0, temperature=temperature,
            top_k=top_k, top_p=top_p, seeds=seeds, position=start,
        )  # fmt: skip
        f_hat, inputs = model.quantizer.step(scale, f_hat, picks)
        codes.append(picks)
        if scales_callback is not None:
            scales_callback(scale, f_hat, picks)
    return torch.cat(codes, dim=1)


def _batch(condition: Tensor | None, num: int | None) -> int:
    if condition is None:
        num = 1 if num is None else num
        if num < 0:
            raise ValueError(f"num must be at least 0, got {num}")
        return num
    if num is not None and num != len(condition):
        raise ValueError(f"num is {num}, but there are {len(condition)} conditions")
    return len(condition)


def _seeds(seed: int | Sequence[int] | Tensor, batch: int, device: torch.device) -> Tensor:
    seeds = range(seed, seed + batch) if isinstance(seed, int) else seed
    if not isinstance(seeds, Tensor):
        seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
    if seeds.shape != (batch,):
        raise ValueError(f"{batch} items need as many seeds, got {len(seeds)}")
    return seeds


class Run:
    """One call: its caches and modulations. With guidance the items come twice, the conditional ones first."""

    def __init__(self, model: AAR, dtype: torch.dtype, condition: Tensor, guided: bool):
        self.model, self.engine = model, engine_of(model, dtype)
        self.guided, self.batch = guided, len(condition)
        self.embedding = model.embed_condition(condition)
        self.modulations = modulations_of(model, self.embedding)
        self.caches = caches_of(model, self.batch * (2 if guided else 1), model.schedule.total)

    def logits(self, scale: int, inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of one scale from its ``inputs[B, n, latent_dim]``, and the unconditional ones where guided."""
        model = self.model
        if scale == 0:
            caches = [ak.ScaleCache(cache.k[: self.batch], cache.v[: self.batch]) for cache in self.caches]
            logits = self.engine.logits(model.first_tokens(self.embedding), self.modulations, caches)
            self._enter_null(model.schedule.lengths[0])
            return logits, None
        x = self.engine.word(inputs) + model.places(scale, scale + 1)
        if not self.guided:
            return self.engine.logits(x, self.modulations, self.caches), None
        return self.engine.logits(torch.cat([x, x]), self.modulations, self.caches).chunk(2)

    def _enter_null(self, length: int) -> None:
        """All caches hold the first scale now; so do those of the unconditional half, which never ran."""
        for cache, null in zip(self.caches, self.engine.null_caches, strict=True):
            if self.guided:
                cache.k[self.batch :, :length], cache.v[self.batch :, :length] = null.k, null.v
            cache.length = length
        if self.guided:
            pairs = zip(self.modulations, self.engine.null_modulations, strict=True)
            self.modulations = [torch.cat([own, null.expand(self.batch, -1)]) for own, null in pairs]


def modulations_of(model: AAR, embedding: Tensor) -> list[Tensor]:
    """``[B, 6 C]`` of each block, and ``[B, 2 C]`` of the head."""
    adaptive = F.silu(embedding)
    return [part.modulation(adaptive) for part in model.blocks] + [model.head_modulation(adaptive)]


def caches_of(model: AAR, batch: int, total: int) -> list[ak.ScaleCache]:
    """An empty cache for each block."""
    config, like = model.config, model.position
    sizes = (batch, total, config.heads, config.width // config.heads)
    return [ak.ScaleCache.empty(*sizes, dtype=like.dtype, device=like.device) for _ in model.blocks]


class Engine:
    """What sampling derives from the weights: their packing, and the first scale of the null condition.

    It holds no parameter itself, so that it dies with the model.
    """

    def __init__(self, model: AAR, dtype: torch.dtype):
        self.eps = model.config.norm_eps
        self.layers = [_Layer(block, dtype) for block in model.blocks]
        self.word, self.head = _linear(model.word, dtype), _linear(model.head, dtype)
        embedding = model.embed_condition(model.null_condition[None])
        self.null_modulations = modulations_of(model, embedding)
        self.null_caches = caches_of(model, 1, model.schedule.lengths[0])
        self.blocks(model.first_tokens(embedding), self.null_modulations, self.null_caches)

    def logits(self, x: Tensor, modulations: list[Tensor], caches: list[ak.ScaleCache]) -> Tensor:
        """``[B, n, codebook_size]`` in fp32."""
        return self.head(self.blocks(x, modulations, caches)).float()

    def blocks(self, x: Tensor, modulations: list[Tensor], caches: list[ak.ScaleCache]) -> Tensor:
        """``[B, n, C]``, ready for the head, of the tokens of one scale; their keys and values enter the caches."""
        parts = [of_block.chunk(6, dim=-1) for of_block in modulations[:-1]]
        before = [(scale1, shift1) for _, _, scale1, _, shift1, _ in parts] + [modulations[-1].chunk(2, dim=-1)]
        y = layer_norm_modulate(x, *before[0], eps=self.eps)
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            gate1, gate2, _, scale2, _, shift2 = parts[i]
            x, y = gated_residual_modulate(x, layer.attend(y, cache), gate1, scale2, shift2, eps=self.eps)
            x, y = gated_residual_modulate(x, layer.feed_forward(y), gate2, *before[i + 1], eps=self.eps)
        return y


class _Layer:
    """A block's weights."""

    def __init__(self, block: Block, dtype: torch.dtype):
        self.heads, self.softmax_scale = block.heads, block.softmax_scale
        self.log_scale = None if block.log_scale is None else block.log_scale.detach()
        self.qkv = _linear(block.qkv, dtype, bias=block.qkv_bias)
        self.proj, self.fc2 = _linear(block.proj, dtype), _linear(block.fc2, dtype)
        self.fc1 = _linear(block.fc1, dtype, activation="gelu_tanh")

    def attend(self, x: Tensor, cache: ak.ScaleCache) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.heads)
        scale = {"softmax_scale": self.softmax_scale, "head_log_scale": self.log_scale}
        return self.proj(rearrange(ak.scale_attention_step(q, k, v, cache, **scale), "b n h d -> b n (h d)"))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def _linear(
    module: nn.Linear, dtype: torch.dtype, *, bias: Tensor | None = None, activation: str | None = None
) -> Linear:
    """The layer with its weight kept in ``dtype``: packed for the native kernels where those can run it."""
    weight, bias = module.weight.detach(), module.bias.detach() if bias is None else bias
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        packed = pack(weight, dtype=dtype)
        return lambda x: linear(x, packed, bias, activation=activation)
    if dtype == torch.int8:
        raise ValueError(f"int8 weights need a float32 model on the CPU, not {weight.dtype} on {weight.device}")
    weight, narrow = weight.to(dtype), bias.to(dtype)

    def run(x: Tensor) -> Tensor:
        y = F.linear(x.to(dtype), weight, narrow)
        return (F.gelu(y, approximate="tanh") if activation else y).to(x.dtype)

    return run


_engines: DerivedCache[Engine] = DerivedCache()


def engine_of(model: AAR, dtype: torch.dtype) -> Engine:
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8):
        raise ValueError(f"weights are kept in a floating dtype or int8, not {dtype}")
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("quantizer.")]
    return _engines.get(parameters, lambda: Engine(model, dtype), dtype)
