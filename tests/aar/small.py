"""A SAT, waves and directory listings small enough for tests."""

from pathlib import Path

import torch

from aar import SAT, SATConfig

# One-second windows as published, everything else as small as the architecture allows.
TINY = SATConfig(
    n_filters=2,
    dim=12,
    latent_dim=6,
    lengths=(1, 5, 25, 75),
    codebook_size=20,
    phi_kernel_sizes=(3, 5),
    lstm_layers=1,
)

# Larger ones, of which every layer of an autoencoder has work to do: as published but for the channels, and odd in all.
AUTOENCODERS = [
    SATConfig(n_filters=8, dim=128, lstm_layers=2, codebook_size=64),
    SATConfig(n_filters=5, ratios=(4, 3, 1), lengths=(1, 3, 7), dim=20, latent_dim=10, lstm_layers=1, codebook_size=9),
]


def tiny_sat(seed: int = 0, config: SATConfig = TINY) -> SAT:
    torch.manual_seed(seed)
    return SAT(config).eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def files_under(directory: Path) -> list[str]:
    """Every file, hidden ones too, relative to the directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
