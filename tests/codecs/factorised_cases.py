"""DAC's and SNAC's quantizers, built by the packages' constructors with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from codec_packages import load
from quantization.projected_cases import assert_projected_codes
from torch import Tensor, nn

from aar_kernels.quantization import ProjectedLevels


@dataclass
class Factorised:
    """A quantizer, its channels, and the strides of its levels. `forward` of all packages gives the sum and the codes
    first."""

    module: nn.Module
    channels: int
    strides: list[int]
    decode: Callable[[nn.Module, object], Tensor]  # codes as `forward` gives them -> [B, channels, T]

    @property
    def levels(self) -> int:
        return len(self.strides)


def descript(rng) -> Factorised:
    quantize = load("dac.nn.quantize")
    channels, levels = rng.choice((16, 40)), rng.randint(1, 6)
    module = quantize.ResidualVectorQuantize(
        input_dim=channels, n_codebooks=levels, codebook_size=rng.choice((30, 64)), codebook_dim=rng.choice((8, 3)),
        quantizer_dropout=0.5,
    )  # fmt: skip
    return Factorised(module, channels, [1] * levels, lambda m, codes: m.from_codes(codes)[0])


def transformers(rng) -> Factorised:
    from transformers import DacConfig
    from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

    channels, levels = rng.choice((16, 40)), rng.randint(1, 6)
    module = DacResidualVectorQuantizer(DacConfig(
        hidden_size=channels, n_codebooks=levels, codebook_size=rng.choice((30, 64)), codebook_dim=rng.choice((8, 3)),
        quantizer_dropout=0.5,
    ))  # fmt: skip
    if rng.random() < 0.5:  # as `DacModel.apply_weight_norm` does
        for level in module.quantizers:
            for conv in (level.in_proj, level.out_proj):
                nn.utils.parametrizations.weight_norm(conv)
    return Factorised(module, channels, [1] * levels, lambda m, codes: m.from_codes(codes)[0])


def snac(rng) -> Factorised:
    vq = load("snac.vq")
    channels, strides = rng.choice((16, 40)), rng.choice(([4, 2, 1], [8, 4, 2, 1], [1], [1, 3], [2, 2]))
    module = vq.ResidualVectorQuantize(channels, rng.choice((30, 64)), 8, strides)
    return Factorised(module, channels, strides, lambda m, codes: m.from_codes(codes))


FACTORISED = {"descript-audio-codec": descript, "transformers DAC": transformers, "snac": snac}


def make_factorised(name: str, rng) -> Factorised:
    torch.manual_seed(rng.randint(0, 1000))
    case = FACTORISED[name](rng)
    with torch.no_grad():
        for level in case.module.quantizers:
            level.in_proj.bias.normal_()
            level.out_proj.bias.normal_().mul_(0.1)
    weights_of(case.module.eval(), case.strides)  # without it weight norm of the old kind cannot be copied
    return case


@torch.no_grad()
def weights_of(module: nn.Module, strides: list[int]) -> ProjectedLevels:
    """The quantizer as data. A forward pass, in which weight norm computes the weights, comes first."""
    levels = module.quantizers
    for level in levels:
        level.out_proj(level.in_proj(torch.zeros(1, level.in_proj.in_channels, 1)))

    def stacked(part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(level, part), name).detach() for level in levels])

    return ProjectedLevels(
        stacked("codebook", "weight"), stacked("in_proj", "weight")[..., 0], stacked("in_proj", "bias"),
        stacked("out_proj", "weight")[..., 0], stacked("out_proj", "bias"), strides,
    )  # fmt: skip


def flat(codes) -> Tensor:
    """``[B, tokens]``, level after level, of what a package's `forward` calls codes."""
    return torch.cat(list(codes), dim=1) if isinstance(codes, list | tuple) else codes.flatten(1)


def assert_same(codes, theirs, original: nn.Module, strides: list[int], x: Tensor) -> bool:
    """The codes are those of the package (returns True), or both are as near as float32 can tell from float64."""
    levels = weights_of(original, strides)
    assert type(codes) is type(theirs)
    assert_projected_codes(flat(codes), levels, x)
    if torch.equal(flat(codes), flat(theirs)):
        return True
    assert_projected_codes(flat(theirs), levels, x)
    assert (flat(codes) != flat(theirs)).float().mean() < 0.1
    return False
