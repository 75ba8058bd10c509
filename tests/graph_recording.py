"""CUDA graphs, and tensors of a device, for a machine without a GPU."""

from __future__ import annotations

import contextlib
import importlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from aar_kernels import attention, linear, modulation, quantization, sampling, seanet
from aar_kernels.cache import DerivedCache


class Recording(TorchDispatchMode):
    """A stand-in for `torch.cuda.CUDAGraph`: every operator called, on the very tensors that it was called on.

    As in a CUDA graph, `replay` computes again what operators computed, in the memory where they did; numbers that the
    host found out in between stay as they were.
    """

    made = 0  # how many there have been

    def __init__(self):
        super().__init__()
        Recording.made += 1
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for before, now in zip(tree_iter(out), tree_iter(again), strict=True):
                if isinstance(before, Tensor) and before is not now:
                    before.copy_(now)


class Stream:
    def wait_stream(self, other) -> None:
        pass


def record_graphs(monkeypatch) -> None:
    """Makes `aar_kernels.graph.Graph` work on the CPU, by `Recording`."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Recording, "made", 0)


class Launches(TorchDispatchMode):
    """Names of what would be launched for meta tensors; raises at whatever would wait for the device: values that are
    asked for, and copies from and to the host."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is torch.ops.aten.index.Tensor:
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        out = func(*args, **(kwargs or {}))
        tensors = [tensor for tensor in tree_iter((args, kwargs, out)) if isinstance(tensor, Tensor)]
        copied = any(tensor.device.type != "meta" for tensor in tensors)
        if waits or copied:
            raise AssertionError(f"{func} waits for the device")
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func.__name__.partition(".")[0])
        return out


class _Kernel:
    def __init__(self, name: str, launches: list[str]):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(self.name)


def fake_triton(monkeypatch, launches: Launches) -> None:
    """The Triton backend takes meta tensors: its launches are noted and its kernels do nothing."""
    for package in (attention, linear, modulation, quantization, sampling, seanet):
        backend = importlib.import_module(f"{package.__name__}.triton")
        monkeypatch.setattr(backend, "unavailable", lambda: None)
        monkeypatch.setattr(backend, "wrong_device", lambda problem: None)
        for name in [name for name in vars(backend.kernels) if name.endswith("_kernel")]:
            of_package = f"{package.__name__.rpartition('.')[2]}.{name.removesuffix('_kernel')}"
            monkeypatch.setattr(backend.kernels, name, _Kernel(of_package, launches.names))
    for ops in (attention.ops, modulation.ops, quantization.ops):
        monkeypatch.setattr(ops, "call", lambda name, *args, ops=ops: ops._implementation(name)(*args))
    monkeypatch.setattr(linear.ops, "call", linear.ops._run)
    monkeypatch.setattr(sampling.ops, "sample", sampling.ops._run)
    for name in ("stack", "lstm"):
        monkeypatch.setattr(seanet.ops, name, getattr(seanet.ops, f"_{name}"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no meta tensors
    known: dict[tuple, object] = {}

    def get(cache, tensors, build, *options):  # meta tensors have no address to know them by
        key = id(cache), *map(id, tensors), *options
        if key not in known:
            known[key] = build()
        return known[key]

    monkeypatch.setattr(DerivedCache, "get", get)
