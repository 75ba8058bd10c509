"""A function of tensors on a GPU as one CUDA graph: launched by one call, whatever number of kernels it takes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["MAX_GRAPHS", "Graph", "Graphs", "Pool", "captured_elsewhere", "capturing", "keep"]

MAX_GRAPHS = 8  # of one model; those of one stream share the memory of a run

T = TypeVar("T")


class _Keepers(threading.local):
    """The list of the `Graph` that this thread is making."""

    values: list | None = None


_keepers = _Keepers()


def keep(value: T) -> T:
    """The value; the `Graph` in the making, if there is one, then holds it as long as it lives.

    For what operators remember of weights: a graph reads it by its address, so it must not be given up before.
    """
    if _keepers.values is not None:
        _keepers.values.append(value)
    return value


def captured_elsewhere() -> bool:
    """Whether kernels launched now go into a CUDA graph that keeps nothing: it has to compute everything itself."""
    return _keepers.values is None and capturing()


def capturing() -> bool:
    """Whether kernels launched now go into a CUDA graph instead of the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Pool:
    """Memory that graphs share which are replayed one after another: it is as large as the largest of them needs.

    That is safe since a `Graph` has its inputs elsewhere, and its result is copied before another is replayed.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # the allocator gives a block again on its own stream only


class Graph:
    """``function(*inputs)`` captured once and replayed for other inputs of the same shapes.

    The function must give one tensor, launch the same kernels whatever the inputs hold, and not wait for the device. It
    runs twice: once to compile kernels and to compute what is remembered of weights, once to be captured. Weights are
    read where they lay then: a graph must not outlive them, nor be used after one was replaced.

    Replays are for the stream that was current when it was made. It holds neither the function nor the inputs.

    Args:
        pool: that of another graph for the same stream; its own unless given.
    """

    @torch.inference_mode(False)  # its memory is written by later calls, in whatever mode they are
    @torch.no_grad()
    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Pool | None = None):
        self.pool = pool or Pool()
        current, side = torch.cuda.current_stream(), self.pool.stream
        self._inputs = [tensor.clone() for tensor in inputs]
        self._lock = threading.Lock()
        self._graph = torch.cuda.CUDAGraph()
        self._kept = _keepers.values = []
        side.wait_stream(current)
        try:
            # One stream for both: what is remembered for a stream is found again in the capture.
            with torch.cuda.stream(side):
                function(*self._inputs)
            with torch.cuda.graph(self._graph, self.pool.handle, side):
                self._output = function(*self._inputs)
        finally:
            _keepers.values = None
        current.wait_stream(side)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """A new tensor. Nothing waits for the device."""
        with self._lock:  # another thread must not fill the inputs in between
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
            return self._output.clone()


class Graphs:
    """The latest `MAX_GRAPHS` of a model whose weights stay as they are."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[object, tuple], Graph] = OrderedDict()

    def get(self, stream: object, key: tuple, capture: Callable[[Pool | None], Graph]) -> Graph:
        if (stream, key) not in self._graphs:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)  # before there is another: its memory is free then
            pool = next((graph.pool for (other, _), graph in self._graphs.items() if other == stream), None)
            self._graphs[stream, key] = capture(pool)
        self._graphs.move_to_end((stream, key))
        return self._graphs[stream, key]
