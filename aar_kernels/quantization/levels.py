"""A residual quantizer described as data: what each level does to the residual, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..schedule import GridSchedule, ScaleSchedule

METRICS = ("euclidean", "cosine")


@dataclass(frozen=True, eq=False)
class Levels:
    """The levels of a residual quantizer over a latent sequence ``[batch, latent, T]``.

    Level ``s`` averages the residual down to ``schedule.lengths[s]`` rows (area), replaces each row by the nearest
    code, interpolates back to ``T`` (linear), applies phi, and subtracts. A level of length ``T`` neither averages nor
    interpolates, and a quantizer without ``phi_weights`` has no convolution: plain residual quantization is
    ``Levels(ScaleSchedule((T,) * n), codebooks)``.

    With a `GridSchedule` the input is ``[batch, latent, height, width]`` of the finest scale, averages are over both
    axes, the interpolation is bicubic, and phi is a two-dimensional convolution (VAR, arXiv 2404.02905).

    Args:
        schedule: tokens per level.
        codebooks: ``[S, K, latent]``, or ``[1, K, latent]`` for one codebook that all levels share. There may be more
            than ``S`` of them: a schedule of fewer levels uses the first ones, and what was packed serves both.
        phi_weights, phi_biases: the distinct kernels of phi(u) = (u + conv1d(u)) / 2, each ``[latent, latent, k]``
            with odd ``k`` and ``[latent]``. Zero padding of ``k // 2``. For grids ``[latent, latent, k, k]``. For a phi
            of another ratio see `residual_phi`.
        phi_index: which of them each level uses; ``S`` numbers.
        metric: ``"euclidean"`` or ``"cosine"``: rows and codes are L2-normalised for the search alone; the code that
            is subtracted is the row of the codebook as it stands.
    """

    schedule: ScaleSchedule
    codebooks: Tensor
    phi_weights: Sequence[Tensor] = ()
    phi_biases: Sequence[Tensor] = ()
    phi_index: Sequence[int] = ()
    metric: str = "euclidean"

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def latent_dim(self) -> int:
        return self.codebooks.shape[2]

    @property
    def of_grids(self) -> bool:
        return isinstance(self.schedule, GridSchedule)

    @cached_property
    def weights(self) -> list[Tensor]:
        return [self.codebooks, *self.phi_weights, *self.phi_biases]

    def arguments(self) -> tuple:
        """The flat form in which every operator takes the levels.

        Raises:
            ValueError: shapes, dtypes or options that do not fit together.
        """
        return self._arguments

    @cached_property
    def _arguments(self) -> tuple:
        self._check()
        return (
            self.codebooks,
            list(self.phi_weights),
            list(self.phi_biases),
            list(self.schedule.lengths),
            list(self.phi_index),
            self.metric,
            list(self.schedule.widths) if self.of_grids else [],
        )

    def _check(self) -> None:
        scales, latent = self.schedule.num_scales, self.codebooks.shape[-1]
        shape, axes = list(self.codebooks.shape), 2 if self.of_grids else 1
        if len(shape) != 3 or 1 < shape[0] < scales or 0 in shape:
            raise ValueError(f"codebooks must be [{scales} or 1, codes, latent], got {shape}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {self.metric!r}")
        if len(self.phi_weights) != len(self.phi_biases):
            raise ValueError(f"{len(self.phi_weights)} phi weights but {len(self.phi_biases)} phi biases")
        if self.phi_weights and len(self.phi_index) != scales:
            raise ValueError(f"phi_index needs one entry for each of {scales} scales, got {len(self.phi_index)}")
        if any(not 0 <= k < len(self.phi_weights) for k in self.phi_index):
            raise ValueError(f"phi_index {tuple(self.phi_index)} names kernels outside 0..{len(self.phi_weights) - 1}")
        for weight, bias in zip(self.phi_weights, self.phi_biases, strict=True):
            width = weight.shape[-1] if weight.dim() else 0
            if weight.shape != (latent, latent, *[width] * axes) or width % 2 == 0:
                wanted = f"[{latent}, {latent}{', odd' * axes}]{' and square' * (axes - 1)}"
                raise ValueError(f"a phi weight must be {wanted}, got {list(weight.shape)}")
            if bias.shape != (latent,):
                raise ValueError(f"a phi bias must be [{latent}], got {list(bias.shape)}")
        for weight in self.weights:
            if weight.dtype != self.codebooks.dtype or not weight.dtype.is_floating_point:
                raise ValueError(f"codebooks and phi must share one floating dtype, got {weight.dtype}")


@dataclass(frozen=True, eq=False)
class ProjectedLevels:
    """The levels of a factorised residual quantizer (DAC, SNAC) over a sequence ``[batch, channels, T]``.

    Level ``s`` projects the residual to ``dim`` channels, averages ``strides[s]`` frames at a time, replaces each by
    the nearest code, projects that back, repeats it ``strides[s]`` times, and subtracts. ``T`` must be a multiple of
    every stride. With fewer strides than codebooks the first levels are used.

    Args:
        codebooks: ``[S, K, dim]``.
        weight_in, bias_in: ``[S, dim, channels]`` and ``[S, dim]``.
        weight_out, bias_out: ``[S, channels, dim]`` and ``[S, channels]``.
        strides: of each level.
        metric: as in `Levels`.
    """

    codebooks: Tensor
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor
    strides: Sequence[int]
    metric: str = "cosine"

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def channels(self) -> int:
        return self.weight_in.shape[2]

    @cached_property
    def weights(self) -> list[Tensor]:
        return [self.codebooks, self.weight_in, self.bias_in, self.weight_out, self.bias_out]

    def lengths(self, length: int) -> list[int]:
        """Tokens of each level for a sequence of ``length``.

        Raises:
            ValueError: a stride that does not divide it.
        """
        if length < 1 or any(length % stride for stride in self.strides):
            raise ValueError(f"the length must be a multiple of the strides {tuple(self.strides)}, got {length}")
        return [length // stride for stride in self.strides]

    def arguments(self) -> tuple:
        """The flat form in which the operators take the levels. Raises ValueError for what does not fit together."""
        if self.codebooks.dim() != 3 or 0 in self.codebooks.shape or self.weight_in.dim() != 3:
            raise ValueError("codebooks must be [levels, codes, dim] and weight_in [levels, dim, channels]")
        (books, _, dim), channels = self.codebooks.shape, self.weight_in.shape[2]
        shapes = ((books, dim, channels), (books, dim), (books, channels, dim), (books, channels))
        if any(weight.shape != shape for weight, shape in zip(self.weights[1:], shapes, strict=True)):
            found = [list(weight.shape) for weight in self.weights[1:]]
            raise ValueError(f"the projections must be {[list(shape) for shape in shapes]}, got {found}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {self.metric!r}")
        if not 0 < len(self.strides) <= books or min(self.strides) < 1:
            raise ValueError(f"strides must be up to {books} positive numbers, got {tuple(self.strides)}")
        if any(w.dtype != self.codebooks.dtype or not w.dtype.is_floating_point for w in self.weights):
            raise ValueError("codebooks and projections must share one floating dtype")
        return (*self.weights, list(self.strides), self.metric)


def residual_phi(weight: Tensor, bias: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The weight and bias for `Levels` of phi(u) = (1 - ratio) u + ratio conv(u), whose convolution has these."""
    centre = torch.zeros_like(weight)
    centre[(..., *(size // 2 for size in weight.shape[2:]))].diagonal().fill_(1 - 2 * ratio)
    return 2 * ratio * weight + centre, 2 * ratio * bias


def phi_sharing_index(num_kernels: int, num_scales: int) -> tuple[int, ...]:
    """Which of ``num_kernels`` partially shared phi kernels each scale uses (section 3.1; as VAR does).

    Kernels sit at evenly spaced ticks of [0, 1] and each scale takes the nearest one to its relative position. Ties
    are decided in float64 by the last bit and the first kernel, as the published models were trained.
    """
    margin = 1 / 3 / num_kernels if num_kernels == 4 else 1 / 2 / num_kernels
    ticks = np.linspace(margin, 1 - margin, num_kernels)
    return tuple(int(np.argmin(np.abs(ticks - s / max(num_scales - 1, 1)))) for s in range(num_scales))
