"""How a result is judged: against the same computation in float64, with a tolerance that comes from the
data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aar_kernels import dispatch

FAST = ["native"]  # triton, which runs here in the interpreter, has tests of its own
MARGINS: list[tuple[int, int, float]] = []  # per comparison: codes, codes that differ, largest excess / bound


def require(operator: str, backend: str) -> str:
    """The backend's name; where it cannot run on this machine the test is skipped, with dispatch's reason."""
    reason = dispatch.operators()[operator][backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return backend


def error64(result: Tensor, exact: Tensor) -> float:
    """Largest difference, taken in float64. NaN where either has one, so that no bound holds."""
    assert result.shape == exact.shape
    return (result.detach().double() - exact.detach().double()).abs().max().item() if exact.numel() else 0.0


def assert_as_accurate(fast: Tensor, plain: Tensor, exact: Tensor, what: str = "result") -> None:
    """``fast`` may be twice as far from ``exact`` as ``plain``, the same dtype in plain PyTorch, and one
    rounding.

    Args:
        exact: the same computation in float64.
    """
    assert fast.dtype == plain.dtype, what
    if exact.numel() == 0:
        assert fast.shape == exact.shape, what
        return
    eps = torch.finfo(fast.dtype).eps
    bound = 2 * (error64(plain, exact) + eps * exact.abs().max().item())
    error = error64(fast, exact)
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"
