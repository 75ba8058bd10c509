"""The definition in plain PyTorch: layer by layer, each as its own operator's reference has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..attention import ScaleCache, scale_attention_step
from ..linear import linear
from ..modulation import gated_residual_modulate, layer_norm_modulate

if TYPE_CHECKING:
    from .api import Block


def unavailable() -> str | None:
    return None


def unsupported(problem) -> str | None:
    return None


def step(
    x: Tensor, blocks: Sequence[Block], modulations: Sequence[Tensor], caches: Sequence[ScaleCache],
    softmax_scale: float, eps: float, backend: str = "reference",
) -> Tensor:  # fmt: skip
    """``backend`` is that of the layers."""
    parts = [modulation.chunk(6, dim=-1) for modulation in modulations[:-1]]
    before = [(scale1, shift1) for _, _, scale1, _, shift1, _ in parts] + [modulations[-1].chunk(2, dim=-1)]
    y = layer_norm_modulate(x, *before[0], eps=eps, backend=backend)
    for i, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
        gate1, gate2, _, scale2, _, shift2 = parts[i]
        heads = cache.k.shape[2:]
        q, k, v = linear(y, block.qkv, block.biases[0], backend=backend).unflatten(-1, (3, *heads)).unbind(2)
        scales = {"softmax_scale": softmax_scale, "head_log_scale": block.head_log_scale}
        attended = scale_attention_step(q, k, v, ScaleCache(cache.k, cache.v, cache.length), **scales, backend=backend)
        y = linear(attended.flatten(2), block.proj, block.biases[1], backend=backend)
        x, y = gated_residual_modulate(x, y, gate1, scale2, shift2, eps=eps, backend=backend)
        y = linear(y, block.fc1, block.biases[2], activation="gelu_tanh", backend=backend)
        y = linear(y, block.fc2, block.biases[3], backend=backend)
        x, y = gated_residual_modulate(x, y, gate2, *before[i + 1], eps=eps, backend=backend)
    return y
