"""Adaptive layer norm and gated residuals against plain PyTorch as one writes it, and torch.compile of that.

These operators read and write memory and do little else: each case counts the bytes that must move (each tensor of
``[B, L, C]`` once where it is read and once where it is written), and is held to the rate of a copy.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modulation import gated_residual_modulate, layer_norm_modulate
from . import shapes
from .measure import Case

# Of the relative difference from float64. fp16 is measured where it is asked for.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# Operations per element, forward and backward: mean and variance 4, normalising and modulating 3, the residual 2; the
# gradients of the rows 9, sums for scale and shift 4, and of the residual and its gate 4.
FLOPS = {"layer norm": (7, 13), "gated residual": (9, 17)}


@dataclass(frozen=True)
class Sizes:
    batch: int = 8
    length: int = 455
    channels: int = 1024


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
    for dtype in shapes.dtypes(options, (torch.float32, torch.bfloat16), also=[torch.float16]):
        for sizes in _sizes(options):
            batch, channels = sizes.batch, sizes.channels
            generator = torch.Generator(torch.get_default_device()).manual_seed(0)
            x, y = (torch.randn(batch, sizes.length, channels, generator=generator).to(dtype) for _ in range(2))
            gate, scale, shift, *_ = torch.randn(batch, 6 * channels, generator=generator).to(dtype).chunk(6, dim=-1)
            inputs = {"layer norm": (x, scale, shift), "gated residual": (x, y, gate, scale, shift)}
            # Rows read and written: forward (x -> result; x, y -> x, result), and backward in addition
            # (x, a gradient -> a gradient; x, y, two gradients -> two gradients).
            rows = {"layer norm": (2, 3), "gated residual": (4, 6)}
            for name, functions in pairs.items():
                (forward, backward), (flops, more) = rows[name], FLOPS[name]
                yield _case(name, _forward, functions, inputs[name], sizes, forward, flops)
                yield _case(
                    f"{name} training", _training, functions, inputs[name], sizes, forward + backward, flops + more
                )


def _sizes(options: Namespace) -> list[Sizes]:
    if options.shapes == "sweep":
        return shapes.sweep(options, Sizes(), {
            "batch": options.batch, "length": (64, 256, 1024), "channels": (256, 512, 1024, 2048),
        })  # fmt: skip
    others = {} if options.shapes == "paper" else {"length": 50, "channels": 128}
    return [Sizes(batch, **others) for batch in options.batch]


def _case(
    name: str, make: Callable, functions: dict[str, Callable], inputs: Sequence[Tensor], sizes: Sizes, rows: int,
    flops: int,
) -> Case:  # fmt: skip
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

    dtype = str(x.dtype).removeprefix("torch.")
    shape = f"batch {sizes.batch}, {dtype}" + shapes.others(sizes, Sizes())
    return Case(name, shape, variants, check, flops * x.numel(), rows * x.nbytes, asdict(sizes) | {"dtype": dtype})


def _forward(function: Callable, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return run


def _training(function: Callable, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    shape, device = inputs[0].shape, inputs[0].device
    seeded = (torch.Generator(device).manual_seed(seed) for seed in (1, 2))
    upstream = [torch.randn(shape, generator=generator, device=device) for generator in seeded]
    upstream = [tensor.bfloat16().to(inputs[0].dtype) for tensor in upstream]

    def run() -> tuple[Tensor, ...]:
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, upstream[: len(outputs)])

    return run
