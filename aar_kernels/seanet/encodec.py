"""EnCodec's encoder and decoder, and what descends from them, as layers of this package.

As transformers builds them (``EncodecModel``, ``MimiModel``) and as ``encodec`` and ``moshi`` do, which wrap each
convolution once more. None of them is imported: modules are known by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..weight_norm import current_weight
from .layers import LSTM, Conv, ConvTranspose, Layer, Norm, Residual

__all__ = ["encodec_layers"]


def encodec_layers(network: nn.Module) -> list[Layer | LSTM]:
    """The layers of such an encoder or decoder with the weights that it has now, weight norm folded.

    Raises:
        ValueError: a part that the layers of this package cannot express, such as padding by the last value.
    """
    return _sequence(network.layers if hasattr(network, "layers") else network.model)


def _sequence(modules: Iterable[nn.Module]) -> list[Layer | LSTM]:
    layers, elu = [], False
    for module in modules:
        if isinstance(module, nn.ELU) and module.alpha == 1:
            elu = True
        else:
            layers.append(_layer(module, elu))
            elu = False
    if elu:
        raise ValueError("no layer of this package ends with ELU")
    return layers


def _layer(module: nn.Module, elu: bool) -> Layer | LSTM:
    if hasattr(module, "block") and hasattr(module, "shortcut") and not elu:
        parts = _sequence(module.block)
        if len(parts) == 2 and all(isinstance(part, Conv) and part.elu for part in parts):
            identity = isinstance(module.shortcut, nn.Identity)
            return Residual(*parts, None if identity else _layer(module.shortcut, False))
    lstm = getattr(module, "lstm", None)
    if isinstance(lstm, nn.LSTM) and lstm.bias and not (lstm.bidirectional or lstm.proj_size or elu):
        return LSTM(lstm.all_weights, getattr(module, "skip", True))
    if (layer := _convolution(module, elu)) is None:
        raise ValueError(f"no layer of this package is a {type(module).__name__} such as this")
    return layer


def _convolution(module: nn.Module, elu: bool) -> Conv | ConvTranspose | None:
    """A convolution that ``module`` pads or trims; None for one that is no layer of this package."""
    conv = _inner(module)
    holder = module if isinstance(conv, nn.Conv1d | nn.ConvTranspose1d) else conv
    conv = conv if holder is module else _inner(conv)
    if not isinstance(conv, nn.Conv1d | nn.ConvTranspose1d) or conv.groups != 1:
        return None
    norm = _norm(getattr(holder, "norm", None))
    weight, causal = current_weight(conv), getattr(module, "causal", True)  # moshi's are causal and do not say so
    if isinstance(conv, nn.ConvTranspose1d):
        if getattr(module, "trim_right_ratio", 1) != 1:
            return None
        return ConvTranspose(weight, conv.bias, conv.stride[0], causal, elu, norm)
    if module.pad_mode not in ("reflect", "constant"):
        return None
    reflect = module.pad_mode == "reflect"
    return Conv(weight, conv.bias, conv.stride[0], conv.dilation[0], causal, reflect, elu, norm)


def _inner(module: nn.Module | None) -> nn.Module | None:
    return getattr(module, "convtr", getattr(module, "conv", None))


def _norm(module: nn.Module | None) -> Norm | None:
    if module is None or isinstance(module, nn.Identity):
        return None
    if isinstance(module, nn.GroupNorm) and module.num_groups == 1 and module.affine:
        return Norm(module.weight, module.bias, module.eps)
    raise ValueError(f"no layer of this package is followed by a {module}")
