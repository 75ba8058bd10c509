"""Sampling of an AAR: scale by scale, with a static cache, packed weights, and nothing computed twice.

One function, `run_scales`, is the whole loop: of tensors alone, without waiting for the device. On CUDA it is captured
once as a graph and replayed, else it is called.

What depends on the condition alone (the modulations of all blocks) is computed once per call; what depends on the
weights alone (their packing, and everything about the null condition's first scale) once per model. The first scale
has guidance 0, so its unconditional half is never run: later scales read its keys and values from that once.

Source: arXiv 2408.09027, section 3.2 and appendix; guidance grows from 0 at the first scale to `cfg` at the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import aar_kernels as ak
from aar_kernels import dispatch, transformer
from aar_kernels.cache import DerivedCache
from aar_kernels.graph import Graph, Graphs, capturing, keep
from aar_kernels.linear import linear, pack
from aar_kernels.modulation import gated_residual_modulate, layer_norm_modulate

from .aar import AAR, Block

__all__ = ["sample"]

Linear = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]

NARROW = (torch.int8, torch.float8_e4m3fn)  # of weights alone, not of activations


@torch.no_grad()
def sample(
    model: AAR, condition: Tensor | None = None, *, num: int | None = None, cfg: float = 4.0, top_k: int = 200,
    top_p: float = 0.95, temperature: float = 1.0, seed: int | Sequence[int] | Tensor = 0,
    dtype: torch.dtype | None = None, scales_callback: Callback | None = None, graph: bool | None = None,
) -> Tensor:  # fmt: skip
    """Samples codes ``[B, total]`` int64 of one window each.

    An item's codes depend on its condition and its seed alone, not on what it is batched with.

    Args:
        condition: ``[B, condition_dim]``; None for `num` unconditional items.
        cfg: guidance at the last scale; at scale s of S the logits are ``(1 + t) cond - t uncond`` with
            ``t = cfg * s / (S - 1)``. 0 for none. Unconditional items need none.
        top_k, top_p, temperature: filters of `aar_kernels.sampling.sample`; temperature 0 takes the likeliest code.
        seed: of the random numbers: one for each item (a list, which is copied to the device, or ``[B]`` int64 that is
            there already), or one number, from which item i has ``seed + i``.
        dtype: in which weights are kept: torch.float32, or torch.bfloat16, torch.int8 or torch.float8_e4m3fn to read
            less memory (arithmetic stays fp32 on the CPU, which has no kernel for fp8; on CUDA all but the residual
            stream is in this dtype, or bf16 for int8 and fp8, which need Triton). Of the small model's likeliest codes
            99.5 % stay with bf16, 97.6 % with int8 and 93.1 % with fp8. The model's own unless given.
        scales_callback: called after each scale with its index, the reconstruction so far ``[B, T, latent_dim]``, and
            the scale's codes ``[B, lengths[scale]]``.
        graph: replay the loop as one CUDA graph; None does so wherever that is possible. The first call with other
            options, batch or dtype captures it, which takes as long as two runs and the compilation of kernels, and so
            does one after a weight changed; the last `MAX_GRAPHS` are kept, with the memory that the largest needs.

    Raises:
        ValueError: a condition of another width, cfg below 0, or a filter out of range; or a graph asked for where
            there can be none: on a CPU, for no items, with a callback, for weights made in inference mode, while
            another graph is captured.
        RuntimeError: NaN logits.
    """
    if not cfg >= 0:
        raise ValueError(f"cfg must be at least 0, got {cfg}")
    batch = _batch(condition, num)
    seeds = _seeds(seed, batch, model.position.device)
    options = Options(0.0 if condition is None else cfg, temperature, top_k, top_p)
    condition, dtype = model.conditions(condition, batch), dtype or model.position.dtype
    loop = lambda: partial(run_scales, model, engine_of(model, dtype), options)  # noqa: E731
    why_not = _ungraphed(model, batch, scales_callback)
    if graph and why_not:
        raise ValueError(f"no CUDA graph: {why_not}")
    if graph is False or why_not:
        return loop()(condition, seeds, scales_callback)
    with torch.cuda.device_of(model.position):
        stream, key = torch.cuda.current_stream(), (options, batch, dtype)
        capture = lambda pool: Graph(loop(), (condition, seeds), pool)  # noqa: E731
        return _graphs_of(model).get(stream, key, capture)(condition, seeds)


@dataclass(frozen=True)
class Options:
    """The constants of a loop, as `sample` takes them; cfg is 0 without a condition."""

    cfg: float
    temperature: float
    top_k: int
    top_p: float


def run_scales(
    model: AAR, engine: Engine, options: Options, condition: Tensor, seeds: Tensor, callback: Callback | None = None
) -> Tensor:
    """Codes ``[B, total]`` from ``condition[B, condition_dim]`` and ``seeds[B]``."""
    run = Run(model, keep(engine), condition, options.cfg > 0)
    schedule, last = model.schedule, model.schedule.num_scales - 1
    f_hat = model.position.new_zeros(len(condition), schedule.length, model.config.latent_dim)
    inputs, codes = None, []
    for scale, start in enumerate(schedule.offsets[:-1]):
        logits, uncond = run.logits(scale, inputs)
        picks = ak.sampling.sample(
            logits, uncond=uncond, guidance=options.cfg * scale / max(last, 1), temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p, seeds=seeds, position=start,
        )  # fmt: skip
        codes.append(picks)
        if scale < last or callback is not None:
            f_hat, inputs = model.quantizer.step(scale, f_hat, picks)
        if callback is not None:
            callback(scale, f_hat, picks)
    return torch.cat(codes, dim=1)


_graphs: DerivedCache[Graphs] = DerivedCache()


def _graphs_of(model: AAR) -> Graphs:
    return _graphs.get([*_weights(model), model.quantizer.codebooks], Graphs)


def _ungraphed(model: AAR, batch: int, callback: Callback | None) -> str | None:
    """Why the loop cannot be a graph."""
    if model.position.device.type != "cuda":
        return f"the model is on {model.position.device}"
    if batch == 0:
        return "there are no items"
    if callback is not None:
        return "a callback runs on the host, between scales"
    if model.position.is_inference():
        return "weights made in inference mode may change unseen"
    return "another is being captured" if capturing() else None


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
    if isinstance(seed, int):
        return torch.arange(seed, seed + batch, device=device)
    seeds = seed if isinstance(seed, Tensor) else torch.tensor(list(seed), dtype=torch.int64, device=device)
    if seeds.shape != (batch,):
        raise ValueError(f"{batch} items need as many seeds, got {len(seeds)}")
    return seeds


class Run:
    """One call: its caches and modulations. With guidance the items come twice, the conditional ones first."""

    def __init__(self, model: AAR, engine: Engine, condition: Tensor, guided: bool):
        self.model, self.engine = model, engine
        self.guided, self.batch = guided, len(condition)
        self.embedding = model.embed_condition(condition)
        self.modulations = modulations_of(model, self.embedding)
        self.caches = engine.caches(self.batch * (2 if guided else 1), model.schedule.total)

    def logits(self, scale: int, inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of one scale from its ``inputs[B, n, latent_dim]``, and the unconditional ones where guided."""
        if scale == 0:
            x = self.model.first_tokens(self.embedding)
            logits = self.engine.logits(x, self.modulations, self.caches.of_blocks(self.batch))
            self._enter_null()
            return logits, None
        first, last = self.model.schedule.offsets[scale : scale + 2]
        x = self.engine.word(inputs)
        x = x.expand(2 if self.guided else 1, *x.shape) + self.engine.places[first:last]
        logits = self.engine.logits(x.flatten(0, 1), self.modulations, self.later)
        return logits.chunk(2) if self.guided else (logits, None)

    def _enter_null(self) -> None:
        """All caches hold the first scale now; so do those of the unconditional half, which never ran."""
        null = self.engine.null_caches.memory
        if self.guided:
            self.caches.memory[:, :, self.batch :, : null.shape[3]] = null
            pairs = zip(self.modulations, self.engine.null_modulations, strict=True)
            self.modulations = [torch.cat([own, null.expand(self.batch, -1)]) for own, null in pairs]
        self.later = self.caches.of_blocks(length=null.shape[3])


@dataclass(frozen=True)
class Caches:
    """The keys and values of all blocks in one tensor ``memory[blocks, 2, batch, total, heads, head_dim]``."""

    memory: Tensor

    def of_blocks(self, batch: int | None = None, length: int = 0) -> list[ak.ScaleCache]:
        """The cache of each block, of the first ``batch`` items, holding ``length`` tokens."""
        return [ak.ScaleCache(k, v, length) for k, v in self.memory[:, :, :batch].unbind(0)]


def modulations_of(model: AAR, embedding: Tensor) -> list[Tensor]:
    """``[B, 6 C]`` of each block, and ``[B, 2 C]`` of the head."""
    adaptive = F.silu(embedding)
    return [part.modulation(adaptive) for part in model.blocks] + [model.head_modulation(adaptive)]


class Engine:
    """What sampling derives from the weights: their packing, and the first scale of the null condition.

    It holds no parameter itself, so that it dies with the model.
    """

    def __init__(self, model: AAR, dtype: torch.dtype):
        config = model.config
        self.eps, self.heads, self.head_dim = config.norm_eps, config.heads, config.width // config.heads
        # Of everything between the residual stream, which is in the model's, and the logits.
        self.dtype = _activations(model.position, dtype)
        self.softmax_scale = model.blocks[0].softmax_scale
        make = partial(_Layer, dtype=dtype, activations=self.dtype)
        if model.position.device.type == "cpu" and _is_packed(model.position, dtype):
            make = partial(_packed_block, dtype=dtype)  # all blocks run in one call
        self.layers = [make(block) for block in model.blocks]
        self.word, self.head = _linear(model.word, dtype, self.dtype), _linear(model.head, dtype, self.dtype)
        self.places = model.places(0, model.schedule.num_scales)
        embedding = model.embed_condition(model.null_condition[None])
        self.null_modulations = modulations_of(model, embedding)
        self.null_caches = self.caches(1, model.schedule.lengths[0])
        self.blocks(model.first_tokens(embedding), self.null_modulations, self.null_caches.of_blocks())

    def caches(self, batch: int, total: int) -> Caches:
        """Empty ones."""
        shape = (len(self.layers), 2, batch, total, self.heads, self.head_dim)
        return Caches(self.places.new_empty(shape, dtype=self.dtype))

    def logits(self, x: Tensor, modulations: list[Tensor], caches: list[ak.ScaleCache]) -> Tensor:
        """``[B, n, codebook_size]`` in fp32, or in the narrower dtype in which they were computed."""
        logits = self.head(self.blocks(x, modulations, caches))
        return logits.float() if logits.dtype == torch.float64 else logits

    def blocks(self, x: Tensor, modulations: list[Tensor], caches: list[ak.ScaleCache]) -> Tensor:
        """``[B, n, C]``, ready for the head, of the tokens of one scale; their keys and values enter the caches."""
        if isinstance(self.layers[0], transformer.Block):
            options = {"softmax_scale": self.softmax_scale, "eps": self.eps}
            return transformer.step(x, self.layers, modulations, caches, **options)
        parts = [of_block.chunk(6, dim=-1) for of_block in modulations[:-1]]
        before = [(scale1, shift1) for _, _, scale1, _, shift1, _ in parts] + [modulations[-1].chunk(2, dim=-1)]
        norm = {"eps": self.eps, "dtype": self.dtype}
        y = layer_norm_modulate(x, *before[0], **norm)
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            gate1, gate2, _, scale2, _, shift2 = parts[i]
            x, y = gated_residual_modulate(x, layer.attend(y, cache), gate1, scale2, shift2, **norm)
            x, y = gated_residual_modulate(x, layer.feed_forward(y), gate2, *before[i + 1], **norm)
        return y


def _packed_block(block: Block, dtype: torch.dtype) -> transformer.Block:
    layers = (block.qkv, block.proj, block.fc1, block.fc2)
    biases = (block.qkv_bias, block.proj.bias, block.fc1.bias, block.fc2.bias)
    log_scale = None if block.log_scale is None else block.log_scale.detach()
    weights = (pack(layer.weight, dtype=dtype) for layer in layers)
    return transformer.Block(*weights, tuple(bias.detach() for bias in biases), log_scale)


class _Layer:
    """A block's weights, where they are not packed: layer by layer."""

    def __init__(self, block: Block, dtype: torch.dtype, activations: torch.dtype):
        self.heads, self.softmax_scale = block.heads, block.softmax_scale
        self.log_scale = None
        if block.log_scale is not None:
            wide = torch.float64 if activations == torch.float64 else torch.float32
            self.log_scale = block.log_scale.detach().to(wide)
        self.qkv = _linear(block.qkv, dtype, activations, bias=block.qkv_bias)
        self.proj, self.fc2 = (_linear(layer, dtype, activations) for layer in (block.proj, block.fc2))
        self.fc1 = _linear(block.fc1, dtype, activations, activation="gelu_tanh")

    def attend(self, x: Tensor, cache: ak.ScaleCache) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.heads)
        scale = {"softmax_scale": self.softmax_scale, "head_log_scale": self.log_scale}
        return self.proj(rearrange(ak.scale_attention_step(q, k, v, cache, **scale), "b n h d -> b n (h d)"))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def _linear(
    module: nn.Linear, dtype: torch.dtype, activations: torch.dtype, *, bias: Tensor | None = None,
    activation: str | None = None,
) -> Linear:  # fmt: skip
    """The layer with its weight kept in ``dtype``: packed, or else in PyTorch's own operators."""
    weight, bias = module.weight.detach(), (module.bias.detach() if bias is None else bias).to(activations)
    if _is_packed(weight, dtype):
        packed = pack(weight, dtype=dtype)
        return lambda x: linear(x, packed, bias, activation=activation)
    weight = weight.to(dtype)

    def run(x: Tensor) -> Tensor:
        y = F.linear(x.to(dtype), weight, bias)
        return F.gelu(y, approximate="tanh") if activation else y

    return run


def _activations(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which the layers compute whose weights are kept in ``dtype``."""
    if dtype in NARROW and not _is_packed(weight, dtype):
        raise ValueError(
            f"{dtype} weights need a float32 model on the CPU, or Triton, not {weight.dtype} on {weight.device}"
        )
    if weight.device.type == "cpu":
        return torch.float32 if _is_packed(weight, dtype) else dtype
    return torch.bfloat16 if dtype in NARROW else dtype


def _is_packed(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are kernels for weights packed in ``dtype``: on a CPU with arithmetic in fp32 throughout."""
    if weight.device.type == "cpu":
        return weight.dtype == torch.float32
    return dtype in (torch.bfloat16, *NARROW) and dispatch.select("linear_forward", weight) == "triton"


_engines: DerivedCache[Engine] = DerivedCache()


def engine_of(model: AAR, dtype: torch.dtype) -> Engine:
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16, *NARROW):
        raise ValueError(f"weights are kept in a floating dtype, int8 or float8_e4m3fn, not {dtype}")
    return _engines.get(_weights(model, model.quantizer), lambda: Engine(model, dtype), dtype)


def _weights(model: AAR, without: nn.Module | None = None) -> list[Tensor]:
    """``model.parameters()`` in a sixth of the time, which every call waits for."""
    found, modules = [], [model]
    while modules:
        module = modules.pop()
        if module is not without:
            found += module._parameters.values()
            modules += module._modules.values()
    return [parameter for parameter in found if parameter is not None]
