"""How the weight of a linear layer is stored: its numbers in fp32, bf16 or int8, in the order the kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16  # output channels side by side in memory; the same for every instruction set (csrc/include/aar/linear.h)
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class PackedWeight(NamedTuple):
    """A weight ``[N, K]``, made by `pack`."""

    data: Tensor  # [ceil(N / PANEL), K, PANEL], zeros after N; on CUDA [N, K]
    scale: Tensor | None  # [N] fp32, what one unit of an int8 row is worth; None for the other dtypes
    N: int

    @property
    def K(self) -> int:
        return self.data.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Of memory, padding included: what a product reads."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantize(self) -> Tensor:
        """The fp32 weight ``[N, K]`` that this stands for, exactly."""
        return _dequantized(_rows(self.data, self.N), self.scale)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight in the layout of another device."""
        rows = _rows(self.data, self.N).to(device)
        return PackedWeight(_laid_out(rows), None if self.scale is None else self.scale.to(device), self.N)


def pack(weight: Tensor, *, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Copy a weight into the form that `linear` reads. Later changes of ``weight`` do not reach the copy.

    Args:
        weight: ``[N, K]`` floating point, as in ``nn.Linear``.
        dtype: fp32; bf16 (rounded to nearest even); or int8: each row ``w`` becomes ``round(w / scale)`` with
            ``scale = max|w| / 127``, symmetric, and ties go to even.

    Raises:
        ValueError: another shape or dtype, or int8 of a weight that is not finite.
    """
    if weight.dim() != 2 or 0 in weight.shape or not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be floating point [N, K], got {weight.dtype} {list(weight.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.int8, got {dtype}")
    weight, scale = weight.detach().float(), None
    if dtype == torch.int8:
        if not weight.isfinite().all():
            raise ValueError("weight has a NaN or an Inf, which int8 cannot hold")
        # At least a normal number, so that a row of zeros, or of denormals, does not divide by zero.
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        weight = (weight / scale[:, None]).round_()
    return PackedWeight(_laid_out(weight.to(dtype)), scale, weight.shape[0])


def _laid_out(rows: Tensor) -> Tensor:
    """``[N, K]`` in its device's layout. Always a copy: a weight in training must not reach into a packed one."""
    if rows.device.type == "cuda":
        return rows.clone(memory_format=torch.contiguous_format)
    panels = F.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL)).view(-1, PANEL, rows.shape[1])
    return panels.mT.clone(memory_format=torch.contiguous_format)


def _rows(data: Tensor, N: int) -> Tensor:
    return data if data.dim() == 2 else data.mT.flatten(0, 1)[:N]


def _dequantized(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows.float() if scale is None else rows.float() * scale[:, None]
