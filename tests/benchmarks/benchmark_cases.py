"""A model small enough for tests, in which every part matters."""

import torch

from aar import AAR, AARConfig
from benchmarks.common import random_aar

TINY = AARConfig(
    depth=2, width=64, heads=2, lengths=(1, 3, 6), codebook_size=50, latent_dim=8, condition_dim=16,
    phi_kernel_sizes=(3, 5),
)  # fmt: skip


def tiny_aar(**others) -> AAR:
    return random_aar(AARConfig(**{**vars(TINY), **others})).requires_grad_(False)


def conditions(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, TINY.condition_dim, generator=torch.Generator().manual_seed(1))


def codes_of(model: AAR, batch: int = 3) -> torch.Tensor:
    shape = batch, model.schedule.total
    return torch.randint(model.config.codebook_size, shape, generator=torch.Generator().manual_seed(2))
