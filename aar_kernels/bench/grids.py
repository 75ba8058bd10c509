"""Quantizers of grids at VAR's sizes, against the same loop in plain PyTorch and torch.compile of it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import quantization
from ..quantization import Levels, phi_sharing_index
from ..schedule import GridSchedule
from .measure import Case, Variant

VAR = GridSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


def cases(options: Namespace) -> Iterator[Case]:
    if options.shapes == "sweep":
        return
    torch.manual_seed(0)
    levels = _levels(GridSchedule((1, 2, 4)), 8, 64) if options.shapes == "small" else _levels(VAR, 32, 4096)
    plain, compiler = _Plain(levels), None if options.no_compile else partial(torch.compile, dynamic=False)
    if compiler is not None:
        torch._dynamo.reset()
    for batch in options.batch:
        x = torch.randn(batch, levels.latent_dim, *levels.schedule.grid)
        yield from _cases(levels, plain, x, compiler)


def _levels(schedule: GridSchedule, latent: int, codes: int) -> Levels:
    """Four phi kernels of 3 x 3 and one codebook, as VAR has them."""
    weights = [torch.randn(latent, latent, 3, 3) / (3 * latent**0.5) for _ in range(4)]
    biases = [torch.randn(latent) / 10 for _ in range(4)]
    index = phi_sharing_index(4, schedule.num_scales)
    return Levels(schedule, torch.randn(1, codes, latent) / 3, weights, biases, index)


class _Plain:
    """What VAR's quantizer does, images channels first, distances by one product in place."""

    def __init__(self, levels: Levels):
        self.levels, self.book = levels, levels.codebooks[0]

    def encode(self, x: Tensor) -> Tensor:
        rest, codes = x.clone(), []
        for s, (height, width) in enumerate(self.levels.schedule.grids):
            rows = F.interpolate(rest, size=(height, width), mode="area").permute(0, 2, 3, 1).flatten(0, 2)
            distance = rows.square().sum(1, keepdim=True) + self.book.square().sum(1)
            codes.append(distance.addmm_(rows, self.book.T, alpha=-2).argmin(1).view(len(x), -1))
            rest -= self.act(s, codes[-1])
        return torch.cat(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        return sum(self.act(s, part) for s, part in enumerate(self._parts(codes)))

    def next_scale_inputs(self, codes: Tensor) -> Tensor:
        sums = accumulate(self.act(s, part) for s, part in enumerate(self._parts(codes)[:-1]))
        grids = self.levels.schedule.grids[1:]
        pooled = [F.interpolate(f_hat, size=size, mode="area") for f_hat, size in zip(sums, grids, strict=True)]
        return torch.cat([part.flatten(2) for part in pooled], dim=2).mT

    def act(self, s: int, codes: Tensor) -> Tensor:
        levels = self.levels
        size, k = levels.schedule.grid, levels.phi_index[s]
        image = F.embedding(codes, self.book).mT.unflatten(2, levels.schedule.grids[s])
        if image.shape[2:] != size:
            image = F.interpolate(image, size=size, mode="bicubic")
        return 0.5 * image + 0.5 * F.conv2d(image, levels.phi_weights[k], levels.phi_biases[k], padding=1)

    def _parts(self, codes: Tensor) -> tuple[Tensor, ...]:
        return codes.split(list(self.levels.schedule.lengths), dim=1)


def _cases(levels: Levels, plain: _Plain, x: Tensor, compiler) -> Iterator[Case]:
    codes, schedule = quantization.encode(x, levels), levels.schedule
    shape = f"batch {len(x)}, {schedule.grid[0]} x {schedule.grid[1]} x {levels.latent_dim}"
    sizes = {"batch": len(x), "latent": levels.latent_dim, "codes": levels.codebook_size}
    tokens = len(x) * schedule.total
    # The fewest operations without a table: phi at the rate of the codes.
    phi = 2 * tokens * 9 * levels.latent_dim**2
    for name, given, flops in (
        ("encode", x, len(x) * schedule.flops(levels.latent_dim, levels.codebook_size)),
        ("decode", codes, phi),
        ("next_scale_inputs", codes, phi),
    ):
        variants: dict[str, Variant] = {
            "ours": partial(getattr(quantization, name), given, levels),
            "eager": partial(getattr(plain, name), given),
        }
        if compiler is not None:
            variants["compile"] = partial(compiler(getattr(plain, name)), given)
        values = tokens * levels.latent_dim if name == "next_scale_inputs" else x.numel()
        rows = levels.codebook_size if name == "encode" else codes.unique().numel()
        weights = 4 * rows * levels.latent_dim + sum(weight.nbytes for weight in levels.weights[1:])
        moved = 8 * tokens + 4 * values + weights
        check = partial(_codes_differ if name == "encode" else _values_differ, variants)
        yield Case(f"VAR {name.replace('_', ' ')}", shape, variants, check, flops, moved, sizes)


def _codes_differ(variants: dict[str, Variant]) -> str:
    """An image goes its own way from the first code that rounding decides. The tests hold each to its margin."""
    expected = variants["eager"]()
    for name, run in variants.items():
        wrong = (run() != expected).any(dim=1).float().mean().item()
        if wrong > 0.1 + 1 / len(expected) or (run() != expected).float().mean() > 0.02:
            return f"{name}: {wrong:.1%} of images have codes other than eager's"
    return ""


def _values_differ(variants: dict[str, Variant]) -> str:
    expected = variants["eager"]()
    for name, run in variants.items():
        error = ((run() - expected).norm() / expected.norm()).item()
        if not error < 1e-5:
            return f"{name}: relative difference {error:.1e} from eager"
    return ""
