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


def tiny_sat(seed: int = 0, config: SATConfig = TINY) -> SAT:
    torch.manual_seed(seed)
    return SAT(config).eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def files_under(directory: Path) -> list[str]:
    """Every file, hidden ones too, relative to the directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
