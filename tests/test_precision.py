"""The user's choice of precision is left out of comparisons, and comes back."""

from __future__ import annotations

import contextlib

import pytest
import torch

from aar_kernels.precision import without_tf32


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("cudnn", [True, False])
def test_without_tf32(precision, cudnn):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.enabled
    try:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.enabled = cudnn
        with contextlib.suppress(ZeroDivisionError), without_tf32():
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.enabled
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.enabled == cudnn
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.enabled = before[1]
