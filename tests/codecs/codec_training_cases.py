"""Quantizers of every package in training, and a few steps of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from codec_packages import load
from torch import Tensor, nn


@dataclass
class Training:
    """A quantizer in training mode; ``call(module, x[B, C, T])`` gives quantized, codes and a loss, in this order."""

    make: Callable[[], nn.Module]
    channels: int
    call: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]
    fused: bool = True  # whether the search is replaced
    own_steps: int = 0  # how many steps the package's own code must take first


@dataclass
class Trace:
    """What steps of training gave."""

    outputs: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)
    random: Tensor | None = None  # the generator's state behind the last draw


def train(case: Training, module: nn.Module, steps: int, *, seed: int = 0, dtype=torch.float32) -> Trace:
    """Steps with a batch of its own each, of SGD where the module has parameters."""
    module.train()
    trace, generator = Trace(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    parameters = list(module.parameters())
    for _ in range(steps):
        # Around a few centres, so that codes are hit unevenly and some die.
        centres = 2 * torch.randn(12, case.channels, generator=generator)
        which = torch.randint(0, 12, (4, 40), generator=generator)
        noise = 0.3 * torch.randn(4, 40, case.channels, generator=generator)
        x = (centres[which] + noise).mT.to(dtype).contiguous().requires_grad_()
        quantized, codes, loss = case.call(module, x)
        (quantized.square().mean() + loss).backward()
        gradients = [x.grad, *(p.grad for p in parameters if p.grad is not None)]
        trace.outputs += [t.detach().clone() for t in (quantized, loss, *gradients)]
        trace.codes.append(codes)
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    trace.outputs += [value.detach().clone() for value in module.state_dict().values()]
    trace.random = torch.get_rng_state()
    return trace


def residual_vq(fused: bool = True, mask: bool = False, kmeans: bool = False, call: dict | None = None, **options):
    options = {"dim": 16, "num_quantizers": 4, "codebook_size": 30, "threshold_ema_dead_code": 2} | options

    def run(module, x):
        given = dict(call or {})
        if mask:
            given["mask"] = torch.arange(x.shape[2]) < torch.tensor([[40], [3], [17], [25]])
        quantized, codes, losses, *_ = module(x.mT, **given)
        return quantized, codes, losses.sum()

    def make():
        return pytest.importorskip("vector_quantize_pytorch").ResidualVQ(kmeans_init=kmeans, **options)

    return Training(make, options["dim"], run, fused, int(kmeans))


def hierarchical() -> Training:
    def make():
        package = pytest.importorskip("vector_quantize_pytorch")
        return package.HierarchicalVQ(dim=16, codebook_size=30, scales=(5, 10, 40), threshold_ema_dead_code=2)

    def run(module, x):
        quantized, codes, loss, *_ = module(x)
        return quantized, torch.cat(list(codes), dim=1), loss.sum()

    return Training(make, 16, run, own_steps=1)


def encodec(kmeans: bool, **options) -> Training:
    def make():
        core = load("encodec.quantization.core_vq")
        return core.ResidualVectorQuantization(
            num_quantizers=4, dim=16, codebook_size=30, kmeans_init=kmeans, kmeans_iters=3, **options
        )

    def run(module, x):
        quantized, codes, losses = module(x)
        return quantized, codes, losses.sum()

    return Training(make, 16, run, own_steps=int(kmeans))


def moshi() -> Training:
    def make():
        core = load("moshi.quantization.core_vq")
        return core.ResidualVectorQuantization(
            num_quantizers=4, codebook_offset=0, dim=16, codebook_size=30, check_unused_every=2
        )

    def run(module, x):
        result = module(x)
        return result.quantized, result.codes, result.loss.sum()

    # A level runs k-means one step after the level before it. The levels before it are fused by then.
    return Training(make, 16, run, own_steps=4)


def descript() -> Training:
    def make():
        return load("dac.nn.quantize").ResidualVectorQuantize(24, 4, 30, 8, quantizer_dropout=0.5)

    def run(module, x):
        quantized, codes, _, commitment, codebook = module(x)
        return quantized, codes, commitment + codebook

    return Training(make, 24, run)


def transformers_dac() -> Training:
    def make():
        from transformers import DacConfig
        from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

        config = DacConfig(hidden_size=24, n_codebooks=4, codebook_size=30, codebook_dim=8, quantizer_dropout=0.5)
        return DacResidualVectorQuantizer(config)

    def run(module, x):
        quantized, codes, _, commitment, codebook = module(x)
        return quantized, codes, (commitment + codebook).mean()

    return Training(make, 24, run)


def snac() -> Training:
    def make():
        return load("snac.vq").ResidualVectorQuantize(24, 30, 8, [4, 2, 1])

    def run(module, x):
        quantized, codes = module(x)
        return quantized, torch.cat(codes, dim=1), (quantized - x.detach()).square().mean()

    return Training(make, 24, run)


TRAINING = {
    "ResidualVQ": residual_vq(),
    "ResidualVQ, cosine": residual_vq(use_cosine_sim=True),
    "ResidualVQ, k-means": residual_vq(kmeans=True),
    "ResidualVQ, cosine, k-means": residual_vq(kmeans=True, use_cosine_sim=True),
    "ResidualVQ, straight-through": residual_vq(rotation_trick=False),
    "ResidualVQ, shared codebook": residual_vq(shared_codebook=True),
    "ResidualVQ, dropout": residual_vq(quantize_dropout=True),
    "ResidualVQ, mask": residual_vq(mask=True),
    "ResidualVQ, learnable": residual_vq(learnable_codebook=True, ema_update=False),
    "ResidualVQ, directional": residual_vq(directional_reparam=True, rotation_trick=False),
    "ResidualVQ, orthogonal": residual_vq(orthogonal_reg_weight=1.0, ema_update=False),
    "ResidualVQ, projected": residual_vq(codebook_dim=8),
    "ResidualVQ, frozen": residual_vq(call={"freeze_codebook": True}),
    "ResidualVQ, all codes": residual_vq(call={"return_all_codes": True}),
    "ResidualVQ, diversity": residual_vq(fused=False, codebook_diversity_loss_weight=0.1),
    "ResidualVQ, cross entropy": residual_vq(fused=False, commitment_use_cross_entropy_loss=True),
    "ResidualVQ, sampled": residual_vq(fused=False, stochastic_sample_codes=True),
    "ResidualVQ, Gumbel": residual_vq(fused=False, straight_through=True, rotation_trick=False),
    "HierarchicalVQ": hierarchical(),
    "encodec": encodec(kmeans=False),
    "encodec, k-means": encodec(kmeans=True),
    "encodec, no dead codes": encodec(kmeans=False, threshold_ema_dead_code=0),
    "moshi": moshi(),
    "descript-audio-codec": descript(),
    "transformers DAC": transformers_dac(),
    "snac": snac(),
}
