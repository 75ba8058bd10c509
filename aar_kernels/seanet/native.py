"""The compiled CPU backend (csrc)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import library


def unavailable() -> str | None:
    return library.reason


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"compiled for the CPU, but tensors are on {problem.device}"
    if problem.dtype != torch.float32:
        return f"computes in float32, not in {problem.dtype}"
    if problem.needs:
        return f"has no {' nor '.join(problem.needs)}"
    return None


def stack(x: Tensor, weights: Tensor, layers: list[int], block: int) -> Tensor:
    return torch.ops.aar_native.seanet_stack(x.contiguous(), weights, layers, block)


def layer(x: Tensor, weights: Tensor, fields: list[int]) -> Tensor:
    return stack(x, weights, fields, 0)


def layer_backward(
    x: Tensor, weights: Tensor, fields: list[int], grad: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.aar_native.seanet_backward(x.contiguous(), weights, fields, grad.contiguous(), needs_x)


def stack_chunk(
    x: Tensor, weights: Tensor, layers: list[int], state: Tensor, position: int, last: bool, block: int
) -> Tensor:
    out = torch.ops.aar_native.seanet_stack_chunk(x.contiguous(), weights, layers, state, position, last, block)
    torch.autograd.graph.increment_version(state)
    return out


def norm_(x: Tensor, scale: Tensor, shift: Tensor, eps: float, add: Tensor | None) -> None:
    add = None if add is None else add.contiguous()
    torch.ops.aar_native.seanet_norm_(x, scale.contiguous(), shift.contiguous(), eps, add)
    torch.autograd.graph.increment_version(x)


def lstm(x: Tensor, weights: Tensor, channels: int, skip: bool, state: Tensor | None) -> tuple[Tensor, Tensor]:
    state = None if state is None else state.contiguous()
    return torch.ops.aar_native.seanet_lstm(x.contiguous(), weights.flatten(), weights.shape[0], skip, state)
