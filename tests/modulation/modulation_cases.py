"""Inputs of the modulation operators, and one training step with them."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass

import torch
from helpers import assert_as_accurate
from torch import Tensor

from aar_kernels import modulation

CHANNELS = (1, 7, 64, 100, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """``projection[B, 6 C]`` holds gate, scale and shift as a model's projection of its condition does; a case without
    ``y`` is one of `layer_norm_modulate`."""

    x: Tensor
    y: Tensor | None
    projection: Tensor
    autocast: torch.dtype | None = None
    expanded: bool = False  # [B, 1, C] instead of [B, C]

    def double(self) -> Case:
        """The same numbers in float64."""
        y = None if self.y is None else self.y.double()
        return Case(self.x.double(), y, self.projection.double(), None, self.expanded)


def make_case(
    seed: int, *, batch: int = 2, length: int = 5, channels: int = 64, gated: bool = True, offset: float = 0.0,
    dtype: torch.dtype = torch.float32, y_dtype: torch.dtype | None = None, projection_dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None, expanded: bool = False,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, y = draw(batch, length, channels) + offset, draw(batch, length, channels)
    return Case(
        x.to(dtype), y.to(y_dtype or dtype) if gated else None,
        draw(batch, 6 * channels).to(projection_dtype or dtype), autocast, expanded,
    )  # fmt: skip


def random_case(seed: int) -> Case:
    """Any sizes and any mixture of dtypes."""
    choose = random.Random(seed)
    dtype, y_dtype = choose.choice(DTYPES), choose.choice(DTYPES)
    return make_case(
        seed, batch=choose.randint(1, 3), length=choose.choice((1, 2, 31, 33, 75)), channels=choose.choice(CHANNELS),
        gated=choose.random() < 0.7, offset=choose.choice((0.0, 10.0)), dtype=dtype, y_dtype=y_dtype,
        projection_dtype=choose.choice((dtype, torch.float32, torch.bfloat16)),
        autocast=choose.choice((None, torch.bfloat16)), expanded=choose.random() < 0.5,
    )  # fmt: skip


def forward(case: Case, x: Tensor, y: Tensor | None, projection: Tensor, backend: str) -> tuple[Tensor, ...]:
    _, shift, scale, gate, *_ = projection.chunk(6, dim=-1)
    if case.expanded:
        shift, scale, gate = shift[:, None], scale[:, None], gate[:, None]
    context = torch.autocast("cpu", case.autocast) if case.autocast else contextlib.nullcontext()
    with context:
        if y is None:
            return (modulation.layer_norm_modulate(x, scale, shift, backend=backend),)
        return modulation.gated_residual_modulate(x, y, gate, scale, shift, backend=backend)


def training_step(case: Case, backend: str) -> dict[str, Tensor]:
    """Every result, and the gradients by every input of something that depends on each number of the results."""
    inputs = {"x": case.x, "y": case.y, "projection": case.projection}
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
    outputs = forward(case, inputs["x"], inputs.get("y"), inputs["projection"], backend)
    generator = torch.Generator().manual_seed(1)
    # bf16's digits, so that every dtype gets the same upstream gradients
    upstream = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    results = dict(zip(("modulated",) if case.y is None else ("x_new", "modulated"), outputs, strict=True))
    return results | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


def assert_accurate(case: Case, backend: str) -> None:
    """Results and gradients are as near to float64's as the reference's in the same dtypes."""
    fast, plain = training_step(case, backend), training_step(case, "reference")
    exact = training_step(case.double(), "reference")
    for name, value in exact.items():
        assert_as_accurate(fast[name], plain[name], value, name)
