"""Weights of modules with weight norm."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm


def current_weight(module: nn.Module) -> Tensor:
    """The weight that the next forward pass would see: weight norm of the old kind computes it in a hook."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(module)
    return module.weight
