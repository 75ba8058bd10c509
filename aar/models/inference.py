"""SEANet at inference: on a CPU its weights are packed for `aar_kernels.seanet`, anew whenever one has changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aar_kernels import BackendError, dispatch, seanet
from aar_kernels.cache import DerivedCache

from .seanet import Conv, ConvTranspose, Residual, SkipLSTM

__all__ = ["packed_layers", "run"]

_packed: DerivedCache[seanet.PackedSEANet] = DerivedCache()


@torch.no_grad()
def run(network: nn.Module, x: Tensor) -> Tensor:
    """``network(x)`` of an encoder or decoder of `seanet`, without gradients.

    In fp32 on a CPU this runs on the native kernels, if they were built; otherwise it is the network itself.
    """
    parameters = list(network.parameters())
    if not _is_native(x, parameters):
        return network(x)
    return _packed.get(parameters, lambda: seanet.PackedSEANet(packed_layers(network)))(x)


def packed_layers(network: nn.Module) -> list[seanet.Conv | seanet.ConvTranspose | seanet.Residual | seanet.LSTM]:
    """The layers of an encoder or decoder with the weights that it has now."""
    layers, elu = [], False
    for module in network.model:
        if isinstance(module, nn.ELU):
            elu = True
        else:
            layers.append(_layer(module, elu))
            elu = False
    return layers


def _is_native(x: Tensor, parameters: list[Tensor]) -> bool:
    if any(tensor.device != x.device or tensor.dtype != x.dtype for tensor in parameters):
        return False  # the network says what is wrong
    try:
        return dispatch.select("seanet_stack", x) == "native"
    except BackendError:  # a backend was forced that has no such kernel: it is for the quantizer alone
        return False


def _layer(module: nn.Module, elu: bool) -> seanet.Conv | seanet.ConvTranspose | seanet.Residual | seanet.LSTM:
    if isinstance(module, SkipLSTM):
        return seanet.LSTM(module.lstm.all_weights)
    if isinstance(module, Residual):
        first, narrow = _layer(module.block[1], True), _layer(module.block[3], True)
        return seanet.Residual(first, narrow, _layer(module.shortcut, False))
    if isinstance(module, ConvTranspose):
        conv, kind = module.convtr.convtr, seanet.ConvTranspose
    else:
        assert isinstance(module, Conv)
        conv, kind = module.conv.conv, seanet.Conv
    return kind(conv.weight, conv.bias, conv.stride[0], elu=elu)
