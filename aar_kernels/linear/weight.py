"""How the weight of a linear layer is stored: as fp32, bf16, int8 or fp8, in the order that the kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16  # output channels side by side in memory; the same for every instruction set (csrc/include/aar/linear.h)
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}  # what the largest of a row becomes, where rows have a scale


class PackedWeight(NamedTuple):
    """A weight ``[N, K]``, made by `pack`."""

    data: Tensor  # [ceil(N / PANEL), K, PANEL], zeros after N; not on a CPU: [N, K]
    scale: Tensor | None  # [N] fp32, what 1 in a row of int8 or fp8 is worth; None for the other dtypes
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

    @property
    def rows(self) -> Tensor:
        """The stored numbers as ``[N, K]``: a view where there are no panels."""
        return self.data if self.data.dim() == 2 else self.data.mT.flatten(0, 1)[: self.N]

    def dequantize(self) -> Tensor:
        """The fp32 weight ``[N, K]`` that this stands for, exactly."""
        return self.rows.float() if self.scale is None else self.rows.float() * self.scale[:, None]

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight in the layout of another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return PackedWeight(_laid_out(self.rows.to(device)), scale, self.N)


def pack(weight: Tensor, *, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Copy a weight into the form that `linear` reads. Later changes of ``weight`` do not reach the copy.

    Args:
        weight: ``[N, K]`` floating point, as in ``nn.Linear``.
        dtype: fp32; bf16 (rounded to nearest even); int8: each row ``w`` becomes ``round(w / scale)`` with
            ``scale = max|w| / 127``, symmetric, and ties go to even; or ``torch.float8_e4m3fn``, as int8 with
            ``scale = max|w| / 448``, for the Triton backend: on a CPU only the reference takes it.

    Raises:
        ValueError: another shape or dtype, or int8 or fp8 of a weight that is not finite.
    """
    if weight.dim() != 2 or 0 in weight.shape or not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be floating point [N, K], got {weight.dtype} {list(weight.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(map(str, DTYPES[:-1]))} or {DTYPES[-1]}, got {dtype}")
    weight, scale = weight.detach().float(), None
    if dtype in LARGEST:
        if not weight.isfinite().all():
            raise ValueError(f"weight has a NaN or an Inf, which {dtype} cannot hold")
        # At least a normal number, so that a row of zeros, or of denormals, does not divide by zero.
        scale = (weight.abs().amax(dim=1) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
        weight = weight / scale[:, None]
        if dtype == torch.int8:
            weight.round_()  # fp8 rounds as it is converted
    return PackedWeight(_laid_out(weight.to(dtype)), scale, weight.shape[0])


def _laid_out(rows: Tensor) -> Tensor:
    """``[N, K]`` in its device's layout. Always a copy: a weight in training must not reach into a packed one."""
    if rows.device.type != "cpu":
        return rows.clone(memory_format=torch.contiguous_format)
    panels = F.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL)).view(-1, PANEL, rows.shape[1])
    return panels.mT.clone(memory_format=torch.contiguous_format)
