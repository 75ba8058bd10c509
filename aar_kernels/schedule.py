"""The scale schedule: how many tokens each scale has. Every operator of the library shares this one type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class ScaleSchedule:
    """Token counts of the scales, coarse to fine; ``lengths[-1]`` is the length of the full latent sequence.

    The published schedule (arXiv 2408.09027, section 3.1) is ``ScaleSchedule.quadratic(16, 75)``: 455 tokens for the
    75 latent frames of one second. Plain residual quantization is ``ScaleSchedule((T,) * num_levels)``.

    Raises:
        ValueError: no scale, or a length below 1.
    """

    lengths: tuple[int, ...]

    def __init__(self, lengths: Iterable[int]):
        lengths = tuple(int(n) for n in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a schedule needs one or more lengths, each at least 1; got {lengths}")
        object.__setattr__(self, "lengths", lengths)

    @classmethod
    def quadratic(cls, num_scales: int, length: int) -> ScaleSchedule:
        """Lengths ``floor(linspace(1, sqrt(length), num_scales) ** 2)``: the published choice."""
        return cls(_floor(x * x) for x in _linspace(1.0, math.sqrt(length), num_scales))

    @classmethod
    def linear(cls, num_scales: int, length: int) -> ScaleSchedule:
        """Lengths ``floor(linspace(1, length, num_scales))``."""
        return cls(_floor(x) for x in _linspace(1.0, float(length), num_scales))

    @classmethod
    def logarithmic(cls, num_scales: int, length: int) -> ScaleSchedule:
        """Geometric lengths ``floor(exp(linspace(0, log(length), num_scales)))``."""
        return cls(_floor(math.exp(x)) for x in _linspace(0.0, math.log(length), num_scales))

    @property
    def num_scales(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Number of tokens over all scales."""
        return sum(self.lengths)

    @property
    def length(self) -> int:
        """Length of the finest scale."""
        return self.lengths[-1]

    @property
    def offsets(self) -> tuple[int, ...]:
        """``offsets[s]:offsets[s + 1]`` are the tokens of scale ``s``; ``num_scales + 1`` numbers."""
        return (0, *accumulate(self.lengths))

    def slices(self) -> list[slice]:
        """One slice of the token axis per scale."""
        return [slice(a, b) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]

    def scale_of_token(self, device: torch.device | str | None = None) -> Tensor:
        """``[total]`` int64: the scale that each token belongs to."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(torch.arange(self.num_scales, device=device), lengths, output_size=self.total)

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """``[total, total]`` bool, True where query (row) may see key (column): its own and all earlier scales."""
        scale = self.scale_of_token(device)
        return scale[:, None] >= scale[None, :]

    @property
    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same mask in FlexAttention's form ``mask_mod(batch, head, q_idx, kv_idx) -> bool``."""
        starts = self.offsets[1:-1]

        def block_causal(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            seen = q_idx >= 0
            for start in starts:
                seen = seen & ((kv_idx < start) | (q_idx >= start))
            return seen

        return block_causal

    def to_block_mask(self, length: int | None = None, device: torch.device | str | None = None) -> BlockMask:
        """The same mask as FlexAttention's ``BlockMask``, for the first ``length`` tokens (all unless given)."""
        from torch.nn.attention.flex_attention import create_block_mask

        length = self.total if length is None else length
        if not 1 <= length <= self.total:
            raise ValueError(f"length must be 1 to {self.total}, got {length}")
        return create_block_mask(self.mask_mod, None, None, length, length, device=device or torch.get_default_device())

    @property
    def attention_pairs(self) -> int:
        """Number of (query, key) pairs that the mask lets through."""
        return sum(n * end for n, end in zip(self.lengths, self.offsets[1:], strict=True))

    def flops(self, latent_dim: int = 64, codebook_size: int = 1024) -> int:
        """Useful floating-point operations of the nearest-code search of one item: a multiply and an add per
        token, code and latent channel."""
        return 2 * self.total * codebook_size * latent_dim

    def picture(self, width: int = 64) -> str:
        """One line per scale: its tokens drawn over the time axis."""
        rows = []
        for s, n in enumerate(self.lengths):
            starts = {i * width // n for i in range(n)}
            rows.append(f"{s:3d} {n:5d} " + "".join("|" if x in starts else "-" for x in range(width)))
        return "\n".join(rows)


class GridSchedule(ScaleSchedule):
    """Scales of images: each is a grid of ``(height, width)`` tokens, which stand in the sequence row by row.

    VAR's schedule (arXiv 2404.02905) is ``GridSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))``: 680 tokens, 16 x 16 of
    them in the finest scale.

    Args:
        grids: ``(height, width)`` of each scale; a single number is both.

    Raises:
        ValueError: no scale, or a side below 1.
    """

    grids: tuple[tuple[int, int], ...]

    def __init__(self, grids: Iterable[int | tuple[int, int]]):
        pairs = ((grid, grid) if isinstance(grid, int) else grid for grid in grids)
        grids = tuple((int(height), int(width)) for height, width in pairs)
        if not grids or min(min(grid) for grid in grids) < 1:
            raise ValueError(f"a schedule needs one or more grids with sides of at least 1; got {grids}")
        super().__init__(height * width for height, width in grids)
        object.__setattr__(self, "grids", grids)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the finest scale."""
        return self.grids[-1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each scale; its height is its length by that."""
        return tuple(width for _, width in self.grids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GridSchedule) and self.grids == other.grids

    def __hash__(self) -> int:
        return hash(self.grids)

    def __repr__(self) -> str:
        return f"GridSchedule({self.grids})"


def _linspace(start: float, stop: float, steps: int) -> list[float]:
    if steps < 1:
        raise ValueError(f"a schedule needs at least one scale, got {steps}")
    if steps == 1:
        return [stop]
    return [start + (stop - start) * i / (steps - 1) for i in range(steps)]


def _floor(x: float) -> int:
    # sqrt and exp leave the last length a rounding error below the integer it stands for.
    return int(x + 1e-9)
