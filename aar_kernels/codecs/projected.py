"""Factorised residual quantizers (DAC, SNAC, Higgs Audio): each level searches in a few channels of its own.

The packages write them much alike; only the values that come out differ, and those are put together in their files.

DAC and SNAC add a straight-through estimator to the code before they project it, which rounds it once; the operators
project the code itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import quantization
from ..cache import DerivedCache
from ..quantization import ProjectedLevels
from ..weight_norm import current_weight
from .adapter import Adapter, Unsupported, traced
from .search import Search

_weights: DerivedCache[tuple[Tensor, ...]] = DerivedCache()


class Part(NamedTuple):
    """A level as the package wrote it; projections are linear layers or 1x1 convolutions."""

    codebook: Tensor  # [K, dim]
    into: nn.Module
    out: nn.Module


class Encoded(NamedTuple):
    """What an encoding pass knows."""

    levels: ProjectedLevels
    backend: str
    codes: Tensor  # [B, sum(T / strides)]
    latents: Tensor  # [B, levels * dim, T]: what each level projected


class Projected(Adapter):
    """``_encode`` and ``_decode`` on the levels that ``_parts`` finds in the module."""

    _metric = "cosine"

    def _parts(self) -> list[Part]:
        return [Part(level.codebook.weight, level.in_proj, level.out_proj) for level in self.quantizers]

    def _strides(self) -> list[int]:
        return [1] * len(self.quantizers)

    def _check(self) -> str:
        parts = self._parts()
        for projection in (projection for part in parts for projection in part[1:]):
            linear = isinstance(projection, nn.Linear)
            pointwise = isinstance(projection, nn.Conv1d) and projection.kernel_size == (1,) and projection.groups == 1
            if not (linear or pointwise) or projection.bias is None:
                raise Unsupported(f"a projection is not a 1x1 convolution or linear layer with a bias: {projection}")
        sizes = sorted({tuple(part.codebook.shape) for part in parts})
        if len(sizes) != 1:
            raise Unsupported(f"its codebooks differ in size: {sizes}")
        (size, dim), channels, strides = sizes[0], parts[0].into.weight.shape[1], self._strides()
        pooled = f", strides {' '.join(map(str, strides))}" if max(strides) > 1 else ""
        return f"{len(parts)} x {size} codes, {self._metric} in {dim} of {channels} channels{pooled}"

    def _prepare(self, strides: Sequence[int], grad: bool, *inputs: Tensor) -> ProjectedLevels | None:
        """The first levels as data; None where they cannot be remembered or, with ``grad``, a gradient is asked for."""
        parts = self._parts()
        sources = [part.codebook for part in parts]
        for part in parts:
            sources += _parameters(part.into) + _parameters(part.out)
        if grad and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *sources)):
            return None
        if traced() or any(source.is_inference() for source in sources):
            return None

        def build() -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.no_grad():  # made in inference mode, it would have no version
                return (
                    torch.stack([part.codebook for part in parts]),
                    torch.stack([_weight(part.into) for part in parts]),
                    torch.stack([part.into.bias for part in parts]),
                    torch.stack([_weight(part.out) for part in parts]),
                    torch.stack([part.out.bias for part in parts]),
                )

        return ProjectedLevels(*_weights.get(sources, build), strides, self._metric)

    @torch.compiler.disable
    def _encode(self, z: Tensor, count: int, grad: bool = True) -> Encoded | None:
        """``z[B, channels, T]`` by the first ``count`` levels; None where the original must run, as it must, with
        ``grad``, where a gradient is asked for."""
        strides = self._strides()[:count]
        if z.dim() != 3 or 0 in z.shape or count < 1 or any(z.shape[2] % stride for stride in strides):
            return None
        levels = self._prepare(strides, grad, z)
        if levels is None or z.shape[1] != levels.channels:
            return None
        if (backend := self._choose("msrq_encode_projected", levels.codebooks, z)) is None:
            return None
        codes, latents = quantization.encode_projected(z, levels, backend=backend)
        if int(codes.amin()) < 0:  # a NaN or an Inf, for which each package has its own answer
            return None
        return Encoded(levels, backend, codes, latents)

    @torch.compiler.disable
    def _decode(self, codes: Tensor, count: int, length: int) -> tuple[ProjectedLevels, Tensor] | None:
        """Codes ``[B, tokens]`` of the first ``count`` levels -> ``[B, channels, T]`` and the levels; None where the
        original must run."""
        strides = self._strides()[:count]
        if 0 in codes.shape or codes.dtype not in (torch.int64, torch.int32) or len(strides) != count:
            return None
        if any(length % stride for stride in strides) or sum(length // n for n in strides) != codes.shape[1]:
            return None
        levels = self._prepare(strides, True)
        if levels is None or (backend := self._choose("msrq_decode_projected", levels.codebooks)) is None:
            return None
        low, high = codes.aminmax()
        if low < 0 or high >= levels.codebook_size or codes.device != levels.codebooks.device:
            return None
        return levels, quantization.decode_projected(codes.long(), levels, length=length, backend=backend)


class ProjectedSearch(Search):
    """The search of one level ``decode_latents(latents[B, dim, T])`` -> rows ``[B, dim, T]``, codes ``[B, T]``."""

    def _search(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        codes = self._nearest(latents, self.codebook.weight, "cosine") if latents.dim() == 3 else None
        return None if codes is None else (self.codebook(codes).transpose(1, 2), codes)


class CosineSearch(ProjectedSearch):
    """As DAC and SNAC spell it."""

    def decode_latents(self, latents):
        return self._search(latents) or super().decode_latents(latents)


def decoded(encoded: Encoded, length: int) -> Tensor:
    """The sum of the levels' contributions ``[B, channels, T]``."""
    levels, backend, codes, _ = encoded
    return quantization.decode_projected(codes, levels, length=length, backend=backend)


def code_rows(codes: Tensor, levels: ProjectedLevels) -> Tensor:
    """Rows of the codebooks, level below level: codes ``[B, n, T]`` -> ``[B, n * dim, T]``."""
    count, size = codes.shape[1], levels.codebook_size
    offset = torch.arange(0, count * size, size, device=codes.device)[:, None]
    rows = F.embedding(codes + offset, levels.codebooks.flatten(0, 1))
    return rows.permute(0, 1, 3, 2).flatten(1, 2)


def _parameters(projection: nn.Module) -> list[Tensor]:
    """Of the projection as it is, with weight norm of the old kind, or parametrized."""
    nested = projection._modules.get("parametrizations")
    return [*projection._parameters.values(), *(nested["weight"]._parameters.values() if nested is not None else ())]


def _weight(projection: nn.Module) -> Tensor:
    """``[out, in]``"""
    return current_weight(projection).flatten(1)
