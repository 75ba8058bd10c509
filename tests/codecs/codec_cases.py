"""Quantizers of every package, built by their own constructors with random weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from codec_packages import load
from quantization.cases import Case, assert_codes
from torch import Tensor, nn

from aar_kernels import ScaleSchedule
from aar_kernels.quantization import Levels


@dataclass
class Plain:
    """A plain residual quantizer and how it is called."""

    module: nn.Module
    channels: int
    levels: int
    encode: Callable[[nn.Module, Tensor, int], Tensor]  # x[B, C, T], levels -> codes [B, levels, T]
    decode: Callable[[nn.Module, Tensor], Tensor]  # codes [B, levels, T] -> [B, C, T]
    codebooks: Callable[[nn.Module], Tensor]  # [levels, K, D]
    project: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: x  # [B, C, T] -> what is quantized [B, D, T]
    metric: str = "euclidean"


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random codebooks, wherever the package keeps them, of which each level's is smaller than the one before."""
    generator = torch.Generator().manual_seed(seed)
    level = 0
    for name, buffer in module.named_buffers():
        leaf = name.rpartition(".")[2]
        if leaf in ("embed", "embed_sum", "embedding_sum", "embed_avg"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.8**level)
            level += leaf != "embed_avg"
        elif leaf == "cluster_usage":
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        elif leaf in ("inited", "initted", "_initialized"):
            buffer.fill_(1)
    return module


def hf_encodec(rng) -> Plain:
    from transformers import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

    dim, size = rng.choice((8, 24, 40)), rng.choice((16, 64, 128))
    config = EncodecConfig(codebook_dim=dim, hidden_size=dim, codebook_size=size)
    module = EncodecResidualVectorQuantizer(config)
    per_level = config.frame_rate * torch.tensor(size).log2().item() / 1000
    return Plain(
        module, dim, module.num_quantizers,
        lambda m, x, n: m.encode(x, n * per_level * 1.001).transpose(0, 1),
        lambda m, codes: m.decode(codes.transpose(0, 1)),
        lambda m: torch.stack([layer.codebook.embed for layer in m.layers]),
    )  # fmt: skip


def hf_xcodec(rng) -> Plain:
    from transformers import XcodecConfig
    from transformers.models.xcodec.modeling_xcodec import XcodecResidualVectorQuantization

    module = XcodecResidualVectorQuantization(XcodecConfig(codebook_size=rng.choice((32, 100))))
    dim = module.quantizers[0].codebook.embed.shape[1]
    return Plain(
        module, dim, module.num_quantizers,
        lambda m, x, n: m.encode(x, n * m.get_bandwidth_per_quantizer() * 1.001).transpose(0, 1),
        lambda m, codes: m.decode(codes.transpose(0, 1)),
        lambda m: torch.stack([layer.codebook.embed for layer in m.quantizers]),
    )  # fmt: skip


def hf_mimi(rng) -> Plain:
    from transformers import MimiConfig
    from transformers.models.mimi.modeling_mimi import MimiResidualVectorQuantizer

    hidden, dim = rng.choice(((32, 16), (24, 24)))
    config = MimiConfig(
        hidden_size=hidden, vector_quantization_hidden_dimension=dim, codebook_dim=dim,
        codebook_size=rng.choice((32, 64)), num_quantizers=6,
    )  # fmt: skip
    return Plain(
        MimiResidualVectorQuantizer(config), hidden, 6,
        lambda m, x, n: m.encode(x, n).transpose(0, 1),
        lambda m, codes: m.decode(codes),
        lambda m: torch.stack([layer.codebook.embed for layer in m.layers]),
        lambda m, x: x if m.input_proj is None else m.input_proj(x),
    )  # fmt: skip


def encodec(rng) -> Plain:
    core = load("encodec.quantization.core_vq")
    dim, levels = rng.choice((8, 20)), rng.randint(2, 6)
    module = core.ResidualVectorQuantization(
        num_quantizers=levels, dim=dim, codebook_size=rng.choice((30, 64)), kmeans_iters=3
    )
    return Plain(
        module, dim, levels,
        lambda m, x, n: m.encode(x, n).transpose(0, 1),
        lambda m, codes: m.decode(codes.transpose(0, 1)),
        lambda m: torch.stack([layer.codebook for layer in m.layers]),
    )  # fmt: skip


def moshi(rng) -> Plain:
    core = load("moshi.quantization.core_vq")
    dim, levels = rng.choice((8, 20)), rng.randint(2, 6)
    module = core.ResidualVectorQuantization(
        num_quantizers=levels, codebook_offset=0, dim=dim, codebook_size=rng.choice((30, 64))
    )
    return Plain(
        module, dim, levels,
        lambda m, x, n: m.encode(x, n).transpose(0, 1),
        lambda m, codes: m.decode(codes.transpose(0, 1)),
        lambda m: torch.stack([layer.embedding for layer in m.layers]),
    )  # fmt: skip


def residual_vq(rng, **options) -> Plain:
    package = pytest.importorskip("vector_quantize_pytorch")
    dim, levels = rng.choice((8, 20)), rng.randint(2, 6)
    module = package.ResidualVQ(
        dim=dim, num_quantizers=levels, codebook_size=rng.choice((30, 64)), codebook_dim=rng.choice((dim, 12)),
        shared_codebook=rng.random() < 0.3, **options,
    )  # fmt: skip

    def encode(m, x, n):
        return m(x.mT)[1].permute(0, 2, 1)[:, :n]

    return Plain(
        module, dim, levels, encode,
        lambda m, codes: m.get_output_from_indices(codes.permute(0, 2, 1)).mT,
        lambda m: m.codebooks,
        lambda m, x: m.project_in(x.mT).mT,
        metric="cosine" if options.get("use_cosine_sim") else "euclidean",
    )  # fmt: skip


def cosine_vq(rng) -> Plain:
    return residual_vq(rng, use_cosine_sim=True)


PLAIN = {
    "transformers EnCodec": hf_encodec, "transformers X-Codec": hf_xcodec, "transformers Mimi": hf_mimi,
    "encodec": encodec, "moshi": moshi, "ResidualVQ": residual_vq, "ResidualVQ, cosine": cosine_vq,
}  # fmt: skip


def make_plain(name: str, rng) -> Plain:
    case = PLAIN[name](rng)
    fill(case.module.eval(), rng.randint(0, 1000))
    if case.metric == "cosine":
        unit_codes(case.module)
    return case


def unit_codes(module: nn.Module) -> None:
    """As the package keeps them where it searches by cosine."""
    for name, buffer in module.named_buffers():
        if name.endswith("embed"):
            buffer.copy_(nn.functional.normalize(buffer, dim=-1))


@torch.no_grad()
def assert_same_codes(codes: Tensor, theirs: Tensor, case: Plain, original: nn.Module, x: Tensor) -> None:
    """The codes ``[B, n, T]`` are those of the package, or both are as near as float32 can tell from float64."""
    assert codes.dtype == theirs.dtype
    assert codes.shape == theirs.shape
    schedule = ScaleSchedule((x.shape[-1],) * codes.shape[1])
    levels = Levels(schedule, case.codebooks(original).detach(), metric=case.metric)
    rows = Case(levels, case.project(original, x).mT.contiguous().mT, None)
    assert_codes(codes.flatten(1), rows)
    if not torch.equal(codes, theirs):
        assert_codes(theirs.flatten(1), rows)
        tokens = (codes != theirs).any(dim=1)  # a frame goes its own way from the first code that rounding decides
        assert tokens.sum() <= 1 + tokens.numel() / 50


def originals(module: nn.Module) -> nn.Module:
    """A copy that stays as the package wrote it."""
    return copy.deepcopy(module)


def signature(function) -> list:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
