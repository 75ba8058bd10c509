"""SEANet at inference: its weights are packed for `aar_kernels.seanet`, anew whenever one has changed.

On a CPU that is always so. On CUDA it is where `aar_kernels.use_backend` asks for "triton", and then what is between
windows and their codes is one CUDA graph: not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aar_kernels import dispatch, seanet
from aar_kernels.cache import DerivedCache
from aar_kernels.graph import Graph, Graphs, capturing, keep

from .seanet import SEANet

__all__ = ["graphed", "run"]

_packed: DerivedCache[seanet.PackedSEANet] = DerivedCache()
_graphs: DerivedCache[Graphs] = DerivedCache()


@torch.no_grad()
def run(network: SEANet, x: Tensor) -> Tensor:
    """``network(x)`` of an encoder or decoder of `seanet`, without gradients.

    In fp32 on a CPU this runs on the native kernels, if they were built, and on the Triton kernels where these were
    asked for; otherwise it is the network itself.
    """
    backend = network.backend("seanet_stack", x)
    if backend != "native" and not (backend == dispatch.forced() == "triton"):
        return network(x)
    parameters = list(network.parameters())

    @torch.inference_mode(False)
    def build() -> seanet.PackedSEANet:
        return seanet.PackedSEANet(network.layers(), dtype=x.dtype)

    return keep(_packed.get(parameters, build))(x)


def graphed(function: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> Tensor:
    """``function(x)``, which depends on ``weights`` and calls `run`: where that is on Triton kernels on CUDA, as one
    CUDA graph for each function and number of items.

    The first call captures it, and so does one after a weight changed; the last `MAX_GRAPHS` are kept.
    """
    if _ungraphed(x, weights):
        return function(x)
    with torch.cuda.device_of(x):
        stream, key = torch.cuda.current_stream(), (function.__name__, *x.shape)
        return _graphs.get(weights, Graphs).get(stream, key, lambda pool: Graph(function, (x,), pool))(x)


def _ungraphed(x: Tensor, weights: list[Tensor]) -> bool:
    if dispatch.forced() != "triton" or x.device.type != "cuda" or capturing():
        return True
    return any(weight.is_inference() or weight.device != x.device for weight in weights)
