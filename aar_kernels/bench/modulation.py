"""Adaptive layer norm and gated residuals against plain PyTorch as one writes it, and torch.compile of that.

These operators read and write memory and do little else: each case counts the bytes that must move (each tensor of
``[B, L, C]`` once where it is read and once where it is written), and is held to the rate of a copy.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modulation import gated_residual_modulate, layer_norm_modulate
from .measure import Case

LENGTH, CHANNELS = 455, 1024
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the relative difference from float64


def plain_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def plain_residual(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    x = x + gate[:, None] * y
    return x, plain_modulate(x, scale, shift)


def cases(options: Namespace) -> Iterator[Case]:
    pairs = {
        "layer norm": {"ours": layer_norm_modulate, "eager": plain_modulate},
        "gated residual": {"ours": gated_residual_modulate, "eager": plain_residual},
    }
    if not options.no_compile:  # once for all batch sizes and dtypes
        for functions in pairs.values():
            functions["compile"] = torch.compile(functions["eager"], dynamic=True)
    for dtype in TOLERANCE:
        for batch in options.batch:
            generator = torch.Generator().manual_seed(0)
            x, y = (torch.randn(batch, LENGTH, CHANNELS, generator=generator).to(dtype) for _ in range(2))
            gate, scale, shift, *_ = torch.randn(batch, 6 * CHANNELS, generator=generator).to(dtype).chunk(6, dim=-1)
            inputs = {"layer norm": (x, scale, shift), "gated residual": (x, y, gate, scale, shift)}
            # Rows read and written: forward (x -> result; x, y -> x, result), and backward in addition
            # (x, a gradient -> a gradient; x, y, two gradients -> two gradients).
            rows = {"layer norm": (2, 3), "gated residual": (4, 6)}
            for name, functions in pairs.items():
                forward, backward = rows[name]
                yield _case(name, _forward, functions, inputs[name], forward)
                yield _case(f"{name} training", _training, functions, inputs[name], forward + backward)


def _case(name: str, make: Callable, functions: dict[str, Callable], inputs: Sequence[Tensor], rows: int) -> Case:
    x = inputs[0]
    variants = {label: make(function, inputs) for label, function in functions.items()}

    def check() -> str:
        exact = make(functions["eager"], [tensor.double() for tensor in inputs])()
        for label, run in variants.items():
            for result, truth in zip(run(), exact, strict=True):
                error = ((result.double() - truth).norm() / truth.norm()).item()
                if not error < TOLERANCE[x.dtype]:
                    return f"{label}: relative difference {error:.1e} from float64"
        return ""

    shape = f"batch {len(x)}, {str(x.dtype).removeprefix('torch.')}"
    return Case(name, shape, variants, check, flops=0, bytes=rows * x.nbytes)


def _forward(function: Callable, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return run


def _training(function: Callable, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    upstream = [torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    upstream = [tensor.bfloat16().to(inputs[0].dtype) for tensor in upstream]

    def run() -> tuple[Tensor, ...]:
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, upstream[: len(outputs)])

    return run
