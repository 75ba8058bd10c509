"""Gradients of random stacks, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace

import torch
from helpers import error64
from seanet_cases import make_input, make_layers, make_wide_layers
from torch import Tensor

from aar_kernels.seanet import Conv, convolve


def make_trained_layers(seed: int) -> list:
    """Every third time wide ones; a convolution has strides or dilation, not both."""
    layers = make_wide_layers(seed) if seed % 3 == 0 else make_layers(seed)
    both = [isinstance(layer, Conv) and layer.stride > 1 < layer.dilation for layer in layers]
    return [
        replace(layer, dilation=1, stride=min(layer.stride, layer.weight.shape[2])) if odd else layer
        for layer, odd in zip(layers, both, strict=True)
    ]


def mapped(layer, function: Callable[[Tensor], Tensor]):
    """The layer with ``function`` of each of its weights."""
    if isinstance(layer, Tensor):
        return function(layer)
    if not is_dataclass(layer):
        return layer
    return replace(layer, **{field.name: mapped(getattr(layer, field.name), function) for field in fields(layer)})


def gradients(layers: list, x: Tensor, backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The result, and the gradients of x and of each weight."""
    leaves = [x.detach().to(dtype).requires_grad_()]

    def leaf(weight: Tensor) -> Tensor:
        leaves.append(weight.detach().to(dtype).requires_grad_())
        return leaves[-1]

    y = convolve(leaves[0], [mapped(layer, leaf) for layer in layers], backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def check_gradients(seed: int, backend: str, length: int | None = None) -> None:
    """Each gradient may be twice as wrong as plain PyTorch's worst in this case, relative to its largest number.

    Its own error in plain PyTorch would be no measure: some are of one number, which may be right by luck.
    """
    layers = make_trained_layers(seed)
    first = layers[0].first if hasattr(layers[0], "first") else layers[0]
    x = make_input(seed, first.weight.shape[1 if isinstance(first, Conv) else 0], length)
    exact = gradients(layers, x, "reference", torch.float64)
    scales = [found.abs().max().item() for found in exact]

    def errors(found: list[Tensor]) -> list[float]:
        return [
            error64(*pair) / scale if scale > 0 else error64(*pair)
            for *pair, scale in zip(found, exact, scales, strict=True)
        ]

    bound = 2 * max(errors(gradients(layers, x, "reference"))) + 4 * torch.finfo(torch.float32).eps
    for i, error in enumerate(errors(gradients(layers, x, backend))):
        assert error <= bound, f"seed {seed}, gradient {i}: off by {error:.3g}, allowed {bound:.3g}"
