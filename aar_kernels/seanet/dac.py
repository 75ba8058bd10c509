"""DAC's encoder and decoder, and SNAC's where their convolutions are not depthwise, as layers of this package.

As transformers builds them (``DacModel``) and as ``descript-audio-codec`` and ``snac`` do. None of them is imported:
their parts are registered in the order in which they run, and known by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..weight_norm import current_weight
from .layers import Conv, ConvTranspose, Layer, Residual, Tanh

__all__ = ["dac_layers"]


def dac_layers(network: nn.Module) -> list[Layer | Tanh]:
    """The layers of such an encoder or decoder with the weights that it has now, weight norm folded.

    Raises:
        ValueError: a part that the layers of this package cannot express, such as a depthwise convolution.
    """
    layers, snake = [], None
    for part in _parts(network):
        if _is_snake(part) and snake is None:
            snake = part.alpha.flatten()
        elif snake is None and (isinstance(part, Tanh) or _is_unit(part)):
            layers.append(part if isinstance(part, Tanh) else _unit(part))
        else:
            layers.append(_convolution(part, snake))
            snake = None
    if snake is not None:
        raise ValueError("no layer of this package ends with Snake")
    return layers


def _parts(module: nn.Module) -> Iterator[nn.Module | Tanh]:
    """What runs in turn: residual units whole, of all else what it holds."""
    if isinstance(module, nn.Tanh):
        yield Tanh()
    elif _is_list(module) and not _is_unit(module):
        for child in module.children():
            yield from _parts(child)
    else:
        yield module


def _is_list(module: nn.Module) -> bool:
    """Whether it is a list, holds one, or is a block of transformers."""
    held = any(hasattr(module, name) for name in ("block", "model", "res_unit1"))
    return held or isinstance(module, nn.Sequential | nn.ModuleList)


def _is_snake(module: nn.Module | Tanh) -> bool:
    alpha = getattr(module, "alpha", None)
    return isinstance(alpha, Tensor) and alpha.dim() == 3 and alpha.shape[0] == alpha.shape[2] == 1


def _is_unit(module: nn.Module) -> bool:
    """Whether it is Snake and convolution twice, alone or in a list, around which its input goes."""
    parts = list(getattr(module, "block", module).children()) if isinstance(module, nn.Module) else []
    kinds = [_is_snake(part) - isinstance(part, nn.Conv1d) for part in parts]
    return kinds == [1, -1, 1, -1] and not isinstance(module, nn.Sequential)


def _unit(module: nn.Module) -> Residual:
    first_snake, first, narrow_snake, narrow = getattr(module, "block", module).children()
    return Residual(
        _convolution(first, first_snake.alpha.flatten()), _convolution(narrow, narrow_snake.alpha.flatten())
    )


def _convolution(module: nn.Module, snake: Tensor | None) -> Conv | ConvTranspose:
    transposed = isinstance(module, nn.ConvTranspose1d)
    if not transposed and not isinstance(module, nn.Conv1d):
        raise ValueError(f"no layer of this package is a {type(module).__name__} such as this")
    (kernel,), (stride,), (dilation,), (padding,) = module.kernel_size, module.stride, module.dilation, module.padding
    total = dilation * (kernel - 1) + 1 - stride
    known = module.groups == 1 and module.padding_mode == "zeros" and padding == total - total // 2
    if not known or (transposed and (dilation != 1 or module.output_padding[0] not in (0, total % 2))):
        raise ValueError(f"no layer of this package is a convolution such as {module.extra_repr()}")
    weight = current_weight(module)
    if transposed:
        symmetric = module.output_padding[0] == 0
        return ConvTranspose(weight, module.bias, stride, snake=snake, symmetric=symmetric)
    return Conv(weight, module.bias, stride, dilation, reflect=False, snake=snake, symmetric=True)
