"""Quantizers of other packages: accelerated, against their own code and torch.compile of it; a training step too.

Published sizes, random weights, ten seconds of sound (one, where small shapes are asked for) at the smallest of the
batch sizes asked for. What is encoded is the output of an encoder, which is not measured here: on a CPU it takes most
of a codec's time.
"""

from __future__ import annotations

import copy
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..codecs import accelerate
from .measure import Case, Variant


@dataclass
class Codec:
    name: str
    package: str
    make: Callable[[], nn.Module]
    channels: int
    frames: int  # of ten seconds
    flops: int  # of encoding one item: projections and searches
    encode: Callable[[nn.Module, Tensor], list[Tensor]]  # x[B, channels, frames] -> codes of each level
    decode: Callable[[nn.Module, list[Tensor]], Tensor]
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None  # of a training step; None where it does not train


def cases(options: Namespace) -> Iterator[Case]:
    small = options.shapes == "small"
    for codec in CODECS if options.shapes != "sweep" else ():
        torch._dynamo.reset()  # each has recompilations of its own
        if importlib.util.find_spec(codec.package) is None:
            continue
        torch.manual_seed(0)
        theirs = codec.make().eval().requires_grad_(False)
        _fill(theirs)
        ours = copy.deepcopy(theirs)
        accelerate(ours)
        length = codec.frames // 80 * 8 if small else codec.frames  # of small shapes too a multiple of all strides
        x = torch.randn(min(options.batch), codec.channels, length)
        yield from _codec(codec, ours, theirs, x, None if options.no_compile else torch.compile)
        if codec.loss is not None:
            yield _training(codec, x)


def _codec(codec: Codec, ours: nn.Module, theirs: nn.Module, x: Tensor, compiler: Callable | None) -> Iterator[Case]:
    codes = _without_gradients(lambda: codec.encode(theirs, x))()
    encode = {"ours": lambda: codec.encode(ours, x), "eager": lambda: codec.encode(theirs, x)}
    decode = {"ours": lambda: codec.decode(ours, codes), "eager": lambda: codec.decode(theirs, codes)}
    if compiler is not None:
        compiled = compiler(lambda x: codec.encode(theirs, x)), compiler(lambda codes: codec.decode(theirs, codes))
        encode["compile"], decode["compile"] = lambda: compiled[0](x), lambda: compiled[1](codes)
    encode = {name: _without_gradients(run) for name, run in encode.items()}
    decode = {name: _without_gradients(run) for name, run in decode.items()}

    def check_codes() -> str:
        """A frame goes its own way from the first code that rounding decides. The tests hold each to its margin."""
        for name, run in encode.items():
            wrong = max((a != b).float().mean().item() for a, b in zip(run(), codes, strict=True))
            if wrong > 0.01:
                return f"{name}: {wrong:.1%} of a level's codes are not eager's"
        return ""

    def check_values() -> str:
        truth = decode["eager"]()
        for name, run in decode.items():
            error = ((run() - truth).norm() / truth.norm()).item()
            if not error < 1e-5:
                return f"{name}: relative difference {error:.1e} from eager"
        return ""

    shape = f"{len(x)} x {codec.channels} x {x.shape[2]}"
    sizes = {"batch": len(x), "channels": codec.channels, "length": x.shape[2]}
    flops = len(x) * codec.flops * x.shape[2] // codec.frames
    yield Case(f"{codec.name} encode", shape, encode, check_codes, flops, sizes=sizes)
    read = sum(part.numel() for part in codes) * 4 * codec.channels + x.nbytes
    yield Case(f"{codec.name} decode", shape, decode, check_values, 0, read, sizes)


def _training(codec: Codec, x: Tensor) -> Case:
    """Forward and backward pass, moving averages included; no optimizer, and no torch.compile, which packages' k-means
    and dead codes leave in pieces."""
    modules, starts = {}, {}
    for name in ("ours", "eager"):
        torch.manual_seed(0)
        modules[name] = codec.make().train()
        starts[name] = {key: value.clone() for key, value in modules[name].state_dict().items()}
    accelerate(modules["ours"])

    def step(module: nn.Module) -> Tensor:
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        codec.loss(module, leaf).backward()
        return leaf.grad

    runs = {name: lambda module=module: step(module) for name, module in modules.items()}

    def check() -> str:
        """From the same weights: each run moves codebooks."""
        gradients = {}
        for name, run in runs.items():
            modules[name].load_state_dict(starts[name])
            torch.manual_seed(0)
            gradients[name] = run()
        error = ((gradients["ours"] - gradients["eager"]).norm() / gradients["eager"].norm()).item()
        return "" if error < 0.02 else f"ours: relative difference {error:.1e} of the gradient from eager"

    shape = f"{len(x)} x {codec.channels} x {x.shape[2]}"
    sizes = {"batch": len(x), "channels": codec.channels, "length": x.shape[2]}
    flops = len(x) * codec.flops * x.shape[2] // codec.frames
    return Case(f"{codec.name} training", shape, runs, check, flops, sizes=sizes)


def _without_gradients(run: Variant) -> Variant:
    @torch.no_grad()
    def quiet() -> object:
        return run()

    return quiet


def _fill(module: nn.Module) -> None:
    """Packages leave codebooks at zero for a checkpoint to fill: random rows, shorter level by level."""
    level = 0
    for name, buffer in module.named_buffers():
        if name.rpartition(".")[2] in ("embed", "embed_sum"):
            buffer.normal_().mul_(0.9**level)
            level += 1


def _encodec() -> nn.Module:
    from transformers import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

    return EncodecResidualVectorQuantizer(EncodecConfig())


def _mimi() -> nn.Module:
    from transformers import MimiConfig
    from transformers.models.mimi.modeling_mimi import MimiSplitResidualVectorQuantizer

    return MimiSplitResidualVectorQuantizer(MimiConfig())


def _dac() -> nn.Module:
    from transformers import DacConfig
    from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

    return DacResidualVectorQuantizer(DacConfig())


def _snac(channels: int, strides: list[int]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from snac.vq import ResidualVectorQuantize

        return ResidualVectorQuantize(channels, 4096, 8, strides)

    return make


def _residual_vq() -> nn.Module:
    from vector_quantize_pytorch import ResidualVQ

    return ResidualVQ(dim=128, num_quantizers=8, codebook_size=1024)


def _factorised(channels: int, codes: int, dim: int, lengths: list[int]) -> int:
    """Each level's projections there and back, and its search."""
    return sum(2 * n * dim * (2 * channels + codes) for n in lengths)


CODECS = (
    Codec(
        "EnCodec 32", "transformers", _encodec, 128, 750, 2 * 750 * 32 * 1024 * 128,
        lambda m, x: list(m.encode(x, 24.0)), lambda m, codes: m.decode(torch.stack(codes)),
    ),
    Codec(
        "Mimi 32", "transformers", _mimi, 512, 125, 2 * 125 * (32 * 2048 * 256 + 2 * 512 * 256),
        lambda m, x: list(m.encode(x)), lambda m, codes: m.decode(torch.stack(codes, dim=1)),
    ),
    Codec(
        "ResidualVQ 8", "vector_quantize_pytorch", _residual_vq, 128, 750, 2 * 750 * 8 * 1024 * 128,
        lambda m, x: list(m(x.mT)[1].unbind(2)), lambda m, codes: m.get_output_from_indices(torch.stack(codes, dim=2)),
        lambda m, x: m(x.mT)[2].sum(),
    ),
    Codec(
        "DAC 44 kHz, 9", "transformers", _dac, 1024, 862, _factorised(1024, 1024, 8, [862] * 9),
        lambda m, x: list(m(x)[1].unbind(1)), lambda m, codes: m.from_codes(torch.stack(codes, dim=1))[0],
        lambda m, x: sum(m(x)[3:]).mean(),
    ),
    Codec(
        "SNAC 24 kHz, 3", "snac", _snac(768, [4, 2, 1]), 768, 472, _factorised(768, 4096, 8, [118, 236, 472]),
        lambda m, x: m(x)[1], lambda m, codes: m.from_codes(codes), lambda m, x: m(x)[0].square().mean(),
    ),
    Codec(
        "SNAC 44 kHz, 4", "snac", _snac(1024, [8, 4, 2, 1]), 1024, 1024,
        _factorised(1024, 4096, 8, [128, 256, 512, 1024]),
        lambda m, x: m(x)[1], lambda m, codes: m.from_codes(codes), lambda m, x: m(x)[0].square().mean(),
    ),
)  # fmt: skip
