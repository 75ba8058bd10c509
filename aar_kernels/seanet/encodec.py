"""EnCodec's encoder and decoder as transformers builds them (``EncodecModel``), as layers of this package.

transformers is not imported: modules are known by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .layers import LSTM, Conv, ConvTranspose, Layer, Residual

__all__ = ["encodec_layers"]


def encodec_layers(network: nn.Module) -> list[Layer | LSTM]:
    """The layers of ``EncodecModel.encoder`` or ``.decoder`` with the weights that it has now, weight norm folded.

    Raises:
        ValueError: a part that the layers of this package cannot express, such as group norm over time.
    """
    return _sequence(network.layers)


def _sequence(modules: Iterable[nn.Module]) -> list[Layer | LSTM]:
    layers, elu = [], False
    for module in modules:
        if isinstance(module, nn.ELU) and module.alpha == 1:
            elu = True
        else:
            layers.append(_layer(module, elu))
            elu = False
    return layers


def _layer(module: nn.Module, elu: bool) -> Layer | LSTM:
    conv = getattr(module, "conv", None)
    if hasattr(module, "norm"):
        raise ValueError("a normalisation over time has no place in a stack")
    if isinstance(conv, nn.ConvTranspose1d) and conv.groups == 1 and module.trim_right_ratio == 1:
        return ConvTranspose(conv.weight, conv.bias, conv.stride[0], module.causal, elu)
    if isinstance(conv, nn.Conv1d) and conv.groups == 1 and module.pad_mode in ("reflect", "constant"):
        reflect = module.pad_mode == "reflect"
        return Conv(conv.weight, conv.bias, conv.stride[0], conv.dilation[0], module.causal, reflect, elu)
    if hasattr(module, "block") and hasattr(module, "shortcut") and not elu:
        parts = _sequence(module.block)
        if len(parts) == 2 and all(isinstance(part, Conv) and part.elu for part in parts):
            identity = isinstance(module.shortcut, nn.Identity)
            return Residual(*parts, None if identity else _layer(module.shortcut, False))
    lstm = getattr(module, "lstm", None)
    if isinstance(lstm, nn.LSTM) and lstm.bias and not (lstm.bidirectional or lstm.proj_size or elu):
        return LSTM(lstm.all_weights)
    raise ValueError(f"no layer of this package is a {type(module).__name__} such as this")
