"""Quantizers of grids with images for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from quantization.cases import Case
from torch import Tensor

from aar_kernels import GridSchedule
from aar_kernels.quantization import Levels, phi_sharing_index

LATENTS = (32, 1, 5, 16, 40, 64)
SIZES = (64, 7, 300, 1, 33)
BATCHES = (3, 1, 9, 2, 0)
WIDTHS = ((3,), (), (1, 5), (3, 3, 3, 3))


@dataclass
class GridCase(Case):
    """``x`` is ``[B, latent, height, width]``."""

    def rows(self, dtype: torch.dtype) -> Tensor:
        return self.x.flatten(2).mT.to(dtype)


def make_grid_case(seed: int | str, **chosen) -> GridCase:
    """The random case of ``seed``, its grids ragged and of any order; ``"VAR"`` has the published sizes.

    Args:
        chosen: options to set by hand, by the names of the local variables.
    """
    if seed == "VAR":
        schedule = GridSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
        options = {"latent": 32, "size": 4096, "batch": 2, "metric": "euclidean", "widths": (3,) * 4, "shared": True}
        seed = 0
    else:
        rng = random.Random(seed)
        height, width = rng.randint(1, 12), rng.randint(1, 12)
        if seed % 6 == 4:
            width = 1
        coarser = [(rng.randint(1, height + 2), rng.randint(1, width + 2)) for _ in range(seed % 5)]
        schedule = GridSchedule([*coarser, (height, width)])
        options = {
            "latent": LATENTS[seed % 6], "size": SIZES[seed % 5], "batch": BATCHES[seed // 2 % 5],
            "metric": ("euclidean", "cosine")[seed // 3 % 2], "widths": WIDTHS[seed % 4], "shared": seed % 7 != 3,
        }  # fmt: skip
    assert chosen.keys() <= options.keys() | {"schedule"}
    schedule = chosen.pop("schedule", schedule)
    options |= chosen
    generator = torch.Generator().manual_seed(seed)
    scales, latent, widths = schedule.num_scales, options["latent"], options["widths"]
    books = torch.randn(1 if options["shared"] else scales, options["size"], latent, generator=generator) / 3
    weights = [torch.randn(latent, latent, k, k, generator=generator) / (latent**0.5 * k) for k in widths]
    biases = [torch.randn(latent, generator=generator) / 10 for _ in widths]
    index = phi_sharing_index(len(widths), scales) if widths else ()
    levels = Levels(schedule, books, weights, biases, index, options["metric"])
    return GridCase(levels, torch.randn(options["batch"], latent, *schedule.grid, generator=generator), None)


def random_grid_codes(case: GridCase) -> Tensor:
    """Any codes, some of them "no code"."""
    generator, shape = torch.Generator().manual_seed(0), (len(case.x), case.levels.schedule.total)
    codes = torch.randint(case.levels.codebook_size, shape, generator=generator)
    return codes.masked_fill(torch.rand(shape, generator=generator) < 0.1, -1)
