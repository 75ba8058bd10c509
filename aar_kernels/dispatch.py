"""Which backend runs an operator, why the others do not, and how to force one.

A backend of an operator is a module beside its ``ops.py`` (``reference``, ``native``, ``flash``, ``triton``). It has
``unavailable() -> str | None`` (why it cannot run on this machine at all), ``unsupported(problem) -> str | None`` (why
it cannot run this call), and a function for each operator that it implements, named as the operator without its
prefix. Nothing is imported before it is asked for, so neither Triton nor a compiler is needed to import the library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

BACKENDS = ("native", "flash", "triton", "reference")  # in order of preference
_OPERATORS: dict[str, str] = {}  # operator -> the package that holds its backends

_log = logging.getLogger("aar_kernels")
if os.environ.get("AAR_KERNELS_LOG") == "1":
    _log.setLevel(logging.INFO)
    _log.addHandler(logging.StreamHandler())

_forced: str | None = os.environ.get("AAR_KERNELS_BACKEND") or None


class BackendError(RuntimeError):
    """The backend that the caller asked for cannot run the call; the message lists every backend's reason."""


@dataclass(frozen=True)
class Problem:
    """What a backend needs to know to accept or refuse a call."""

    operator: str
    device: str
    dtype: torch.dtype
    needs_grad: bool = False
    deterministic: bool = False
    dim: int | None = None  # the size that kernels are specialised for, such as channels of a head
    needs: tuple[str, ...] = ()  # what few backends have, in words: "grids"


def register(package: str, *operators: str) -> None:
    """Declare operators whose backends are modules of ``package``."""
    _OPERATORS.update(dict.fromkeys(operators, package))


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every operator called inside; ``None`` restores the automatic choice.

    A forced backend never falls back: a call that it cannot run raises `BackendError`.
    """
    global _forced
    _check_name(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def forced() -> str | None:
    """The backend that `use_backend` or ``AAR_KERNELS_BACKEND`` asks for."""
    return _forced


def select(
    operator: str, *tensors: torch.Tensor | None, backend: str | None = None, needs_grad: bool = False,
    dim: int | None = None, needs: tuple[str, ...] = (),
) -> str:  # fmt: skip
    """Name of the backend that runs ``operator`` on these tensors (the first one sets device and dtype).

    Raises:
        ValueError: tensors on different devices, or an unknown backend name.
        BackendError: the forced backend cannot run the call.
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{operator}: all tensors must be on one device, got {first.device} and {tensor.device}")
    forced = backend or _forced
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _select(operator, forced, first.device.type, first.dtype, needs_grad, deterministic, dim, needs)


# Constant under torch.compile: everything it depends on is an argument, so a change makes a new guard.
@torch.compiler.assume_constant_result
def _select(*arguments: object) -> str:
    # The cache cannot carry the mark itself: torch.compile looks through it, and loses the mark.
    return _select_cached(*arguments)


@functools.cache
def _select_cached(
    operator: str, forced: str | None, device: str, dtype: torch.dtype, grad: bool, deterministic: bool,
    dim: int | None, needs: tuple[str, ...],
) -> str:  # fmt: skip
    _check_name(forced)
    problem = Problem(operator, device, dtype, grad, deterministic, dim, needs)
    reasons = {}
    for name in BACKENDS:
        reason = _reason(name, problem)
        if reason is None and forced in (None, name):
            _log.info("%s runs on %s (%s)", problem, name, reasons or "first choice")
            return name
        reasons[name] = reason or "can run this call, but another backend was asked for"
    listing = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    raise BackendError(f"backend {forced!r} cannot run {problem}:{listing}")


@functools.cache
def module(operator: str, backend: str) -> ModuleType:
    """The module that implements ``operator`` on ``backend``."""
    return importlib.import_module(f"{_OPERATORS[operator]}.{backend}")


def operators() -> dict[str, dict[str, str | None]]:
    """For every operator and backend: None where it can run on this machine, else the reason why not."""
    return {op: {name: _unavailable(op, name) for name in BACKENDS} for op in _OPERATORS}


def _unavailable(operator: str, backend: str) -> str | None:
    none = "has no kernel for this operator"
    try:
        implementations = module(operator, backend)
    except ImportError as error:
        return none if error.name == f"{_OPERATORS[operator]}.{backend}" else f"not importable: {error}"
    if not hasattr(implementations, operator.partition("_")[2]):
        return none
    return implementations.unavailable()


def _reason(backend: str, problem: Problem) -> str | None:
    return _unavailable(problem.operator, backend) or module(problem.operator, backend).unsupported(problem)


def _check_name(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; one of {', '.join(BACKENDS)}")
