"""The public function of a transformer's blocks at inference: it checks its input, then picks a backend.

Raises, on every backend alike:
    ValueError: shapes, dtypes or devices that do not fit, or gradients asked for.
    BackendError: a forced backend that cannot run the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dispatch
from ..attention import ScaleCache
from ..linear import PackedWeight
from . import ops, reference


@dataclass(frozen=True)
class Block:
    """A block's weights, packed by `aar_kernels.linear.pack`, all in one dtype.

    Attributes:
        qkv, proj, fc1, fc2: ``[3 C, C]``, ``[C, C]``, ``[hidden, C]`` and ``[C, hidden]``.
        biases: theirs, fp32 and contiguous: ``[3 C]``, ``[C]``, ``[hidden]``, ``[C]``.
        head_log_scale: ``[heads]`` fp32, which makes it cosine attention, see `aar_kernels.scale_attention`.
    """

    qkv: PackedWeight
    proj: PackedWeight
    fc1: PackedWeight
    fc2: PackedWeight
    biases: tuple[Tensor, Tensor, Tensor, Tensor]
    head_log_scale: Tensor | None = None

    def __post_init__(self) -> None:
        channels, hidden = self.qkv.K, self.fc1.N
        wanted = [(3 * channels, channels), (channels, channels), (hidden, channels), (channels, hidden)]
        got = [(weight.N, weight.K) for weight in self.weights]
        if got != wanted:
            raise ValueError(f"the weights of a block of {channels} channels must be {wanted}, got {got}")
        if len({weight.dtype for weight in self.weights}) > 1:
            raise ValueError("the weights of a block must be of one dtype")
        for bias, weight in zip(self.biases, self.weights, strict=True):
            _check_floats("a bias", bias, weight.N)
        if self.head_log_scale is not None:
            _check_floats("head_log_scale", self.head_log_scale, *self.head_log_scale.shape[:1])

    @property
    def weights(self) -> tuple[PackedWeight, PackedWeight, PackedWeight, PackedWeight]:
        return self.qkv, self.proj, self.fc1, self.fc2


def step(
    x: Tensor, blocks: Sequence[Block], modulations: Sequence[Tensor], caches: Sequence[ScaleCache], *,
    softmax_scale: float | None = None, eps: float = 1e-6, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The next tokens (one scale) through all blocks, and through the layer norm before the head.

    A block, with ``gate1, gate2, scale1, scale2, shift1, shift2`` for the parts of its modulation (arXiv 2408.09027,
    section 3.2; VAR, arXiv 2404.02905)::

        x = x + gate1 * proj(attention(qkv(LayerNorm(x) * (1 + scale1) + shift1)))
        x = x + gate2 * fc2(gelu_tanh(fc1(LayerNorm(x) * (1 + scale2) + shift2)))

    It equals the operators `linear`, `scale_attention_step` and `modulation` taken one by one, to the bit on the native
    backend, which spares what each call costs: for few rows of few channels more than its arithmetic. It is for CPUs:
    on a GPU, where this is the plain reference, call the operators one by one within a CUDA graph. For inference: it
    has no gradient.

    Args:
        x: ``[B, n, C]`` fp32 (fp64: reference).
        modulations: ``[B, 6 C]`` for each block, and ``[B, 2 C]``, scale and shift, for the layer norm at the end, in
            x's dtype.
        caches: of each block, ``[B, total, heads, C / heads]``, all of the same length. Afterwards they hold these
            tokens too.
        softmax_scale: factor of the logits; ``1 / sqrt(C / heads)`` unless given, 1 for cosine attention.

    Returns:
        ``[B, n, C]``: ``LayerNorm(x) * (1 + scale) + shift`` of the last residual stream.
    """
    _check(x, blocks, modulations, caches)
    heads, start = caches[0].k.shape[2], caches[0].length
    if softmax_scale is None:
        cosine = blocks[0].head_log_scale is not None
        softmax_scale = 1.0 if cosine else 1 / math.sqrt(x.shape[2] // heads)
    weights = [weight for block in blocks for weight in block.weights]
    tensors = (
        [weight.data for weight in weights],
        [weight.scale for weight in weights if weight.scale is not None],
        [bias for block in blocks for bias in block.biases],
        [block.head_log_scale for block in blocks if block.head_log_scale is not None],
        [*modulations],
        [tensor for cache in caches for tensor in (cache.k, cache.v)],
    )
    all_tensors = (x, *(tensor for group in tensors for tensor in group))
    needs = ("fp8",) if weights[0].dtype == torch.float8_e4m3fn else ()
    name = dispatch.select("transformer_step", *all_tensors, backend=backend, needs=needs)
    if name == "reference":
        out = reference.step(x, blocks, modulations, caches, float(softmax_scale), eps)
    else:
        out = ops.call(x, *tensors, start, heads, float(softmax_scale), eps, name)
    for cache in caches:
        cache.length = start + x.shape[1]
    return out


def _check(x: Tensor, blocks: Sequence[Block], modulations: Sequence[Tensor], caches: Sequence[ScaleCache]) -> None:
    if not blocks or len(caches) != len(blocks) or len(modulations) != len(blocks) + 1:
        got = f"{len(blocks)} blocks, {len(caches)} caches, {len(modulations)} modulations"
        raise ValueError(f"there must be a cache for each of one or more blocks, and one modulation more; got {got}")
    channels = blocks[0].qkv.K
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != channels or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be fp32 or fp64 [B, n >= 1, {channels}], got {x.dtype} {list(x.shape)}")
    for block in blocks:
        if (block.qkv.K, block.qkv.dtype) != (channels, blocks[0].qkv.dtype):
            raise ValueError("all blocks must have the same channels and dtype of weights")
        if (block.head_log_scale is None) != (blocks[0].head_log_scale is None):
            raise ValueError("either all blocks have a head_log_scale, or none")
    for i, modulation in enumerate(modulations):
        width = (6 if i < len(blocks) else 2) * channels
        if modulation.shape != (x.shape[0], width) or modulation.dtype != x.dtype:
            got = f"{modulation.dtype} {list(modulation.shape)}"
            raise ValueError(f"modulation {i} must be {x.dtype} [{x.shape[0]}, {width}], got {got}")
    first = caches[0].k
    for block, cache in zip(blocks, caches, strict=True):
        for tensor in (cache.k, cache.v):
            if tensor.shape != first.shape or tensor.dtype != x.dtype or cache.length != caches[0].length:
                raise ValueError(f"all caches must be {x.dtype}, of one shape, and hold as many tokens")
            if tensor.dim() != 4 or tensor.shape[0] != x.shape[0] or tensor.shape[2] * tensor.shape[3] != channels:
                wanted = f"[{x.shape[0]}, total, heads, {channels} / heads]"
                raise ValueError(f"a cache must be {wanted}, got {list(tensor.shape)}")
            if tensor.shape[3] > 1 and tensor.stride(3) != 1:
                raise ValueError("the cache's channels must be contiguous, since it is written in place")
        if block.head_log_scale is not None and block.head_log_scale.shape != first.shape[2:3]:
            raise ValueError(f"head_log_scale must have {first.shape[2]} heads as the cache")
    if caches[0].length + x.shape[1] > first.shape[1]:
        held = f"the caches hold {caches[0].length} of {first.shape[1]}"
        raise ValueError(f"{x.shape[1]} more tokens do not fit: {held}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *modulations)):
        raise ValueError("the blocks are not differentiable; call them under torch.no_grad()")


def _check_floats(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous fp32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
