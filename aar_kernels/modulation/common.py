"""The layouts that the kernels of every fast backend read."""

from __future__ import annotations

from torch import Tensor


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """What has rows of all tokens, ``[B, L, C]``."""
    return None if tensor is None else tensor.contiguous()


def rows(tensor: Tensor | None) -> Tensor | None:
    """What has one row for each item, ``[B, C]``: channels side by side, as slices of one projection have them."""
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()
