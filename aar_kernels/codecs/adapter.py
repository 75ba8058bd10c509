"""What every adapter is: a subclass, made on the fly, of a class that another package wrote."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect

import torch
from torch import Tensor

from .. import dispatch


class Unsupported(Exception):
    """Why a module stays as its package wrote it."""


class Adapter:
    """Methods that run the fused operators in place of those of the original class, and call ``super()`` where the
    operators cannot give the original's results: gradients, autocast, dtypes other than float32, a GPU unless a backend
    was asked for, ``torch.export``.

    A module is exchanged by its class alone: it keeps its attributes, weights and hooks, and has no new ones.
    """

    _aar_original: type
    _aar_backend: str | None

    def _check(self) -> str:
        """What the module computes, for the report. Raises `Unsupported` if it is not what this adapter replaces."""
        raise NotImplementedError

    def _choose(self, operator: str, *tensors: Tensor, dim: int | None = None) -> str | None:
        """The backend that runs a call on these tensors, ``dim`` as in `dispatch.Problem`; None: the original code."""
        first = tensors[0]
        if any(tensor.dtype != first.dtype for tensor in tensors) or torch.is_autocast_enabled(first.device.type):
            return None
        forced = self._aar_backend or dispatch.forced()
        name = dispatch.select(operator, *tensors, backend=forced, dim=dim)
        return name if forced or (name == "native" and first.device.type == "cpu") else None

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickled as a module of the original class: who loads it need not have this library."""
        _, _, state, *_ = super().__reduce_ex__(protocol)
        return copyreg._reconstructor, (self._aar_original, object, None), state

    def __deepcopy__(self, memo: dict) -> Adapter:
        """A copy that is accelerated too."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def traced() -> bool:
    """Whether the call is recorded rather than run, so that it must be the original's."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def original_class(module: torch.nn.Module) -> type:
    return module._aar_original if isinstance(module, Adapter) else type(module)


@functools.cache
def adapted(original: type, adapter: type[Adapter], backend: str | None) -> type:
    """The subclass of ``original`` with the methods of ``adapter``."""
    members = {"_aar_original": original, "_aar_backend": backend, "__module__": adapter.__module__}
    return type(f"Accelerated{original.__name__}", (adapter, original), members)


def check_signatures(adapter: type[Adapter], original: type) -> None:
    """Raises `Unsupported` if a method that the adapter replaces takes other arguments in this version."""
    for name, _ in inspect.getmembers(adapter, inspect.isfunction):
        if name.startswith("_"):
            continue
        theirs = getattr(original, name, None)
        if theirs is None or _parameters(theirs) != _parameters(getattr(adapter, name)):
            raise Unsupported(f"{original.__name__}.{name} takes other arguments than the version known here")


def _parameters(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
