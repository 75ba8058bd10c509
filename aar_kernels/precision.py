"""Comparing formulas and not roundings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """PyTorch's products and convolutions in full float32, whatever the user chose; cuDNN's are TF32 by default.

    cuDNN is left out altogether: its flags for TF32 raise an error where the user has set the newer ones.
    """
    cudnn, precision = torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()
    torch.backends.cudnn.enabled = False
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
