"""Multi-scale residual quantization against plain PyTorch, torch.compile of it, and vector-quantize-pytorch.

Of grids too: `grids`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from ..quantization import Levels, MultiScaleResidualQuantizer, encode
from ..schedule import ScaleSchedule
from . import grids, shapes
from .measure import Case, Variant


@dataclass(frozen=True)
class Sizes:
    """The published quantizer's, unless said."""

    batch: int = 8
    latent: int = 64
    length: int = 75
    codes: int = 1024
    scales: int = 16

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.quadratic(self.scales, self.length)

    @property
    def tokens(self) -> int:
        return self.batch * self.schedule.total

    @property
    def search_flops(self) -> int:
        return self.batch * self.schedule.flops(self.latent, self.codes)

    @property
    def phi_flops(self) -> int:
        """phi as a convolution at the rate of the codes: the fewest operations without a table of weights times
        codes."""
        return 2 * self.tokens * 9 * self.latent**2

    @property
    def sequence_bytes(self) -> int:
        return 4 * self.batch * self.latent * self.length

    @property
    def name(self) -> str:
        return f"batch {self.batch}, latent {self.latent}" + shapes.others(self, Sizes(), ("batch", "latent"))


def cases(options: Namespace) -> Iterator[Case]:
    if torch.float32 not in shapes.dtypes(options, [torch.float32]):
        return
    for same, group in groupby(_sizes(options), lambda sizes: replace(sizes, batch=0)):
        torch.manual_seed(0)
        model = _quantizer(same).eval().requires_grad_(False)
        trainer = _quantizer(same)
        compile_all = None if options.no_compile else _Compiled(model, trainer)
        for sizes in group:
            x = torch.randn(sizes.batch, sizes.latent, sizes.length)
            yield _encode(model, x, sizes, compile_all)
            yield _decode(model, x, sizes, compile_all)
            yield _training(trainer, x, sizes, compile_all)
            yield from _vector_quantize_pytorch(x, sizes)
    yield from grids.cases(options)


def _sizes(options: Namespace) -> list[Sizes]:
    if options.shapes == "sweep":
        return shapes.sweep(options, Sizes(), {
            "batch": options.batch, "latent": options.latent, "length": (25, 75, 150, 300),
            "codes": (256, 1024, 4096), "scales": (4, 8, 16, 24),
        })  # fmt: skip
    others = {} if options.shapes == "paper" else {"length": 25, "codes": 64, "scales": 6}
    return [Sizes(batch, latent, **others) for latent in options.latent for batch in options.batch]


def _quantizer(sizes: Sizes, **options) -> MultiScaleResidualQuantizer:
    arguments = {"schedule": sizes.schedule, "codebook_size": sizes.codes, "kmeans_init": False}
    return MultiScaleResidualQuantizer(sizes.latent, **arguments | {"dead_code_threshold": 0} | options)


class _Compiled:
    """torch.compile of the reference, once for all batch sizes: what a user without kernels would try first."""

    def __init__(self, model: MultiScaleResidualQuantizer, trainer: MultiScaleResidualQuantizer):
        torch._dynamo.reset()  # what was compiled for another model is of no more use
        self.encode = torch.compile(lambda x: model.encode(x, backend="reference"), dynamic=True)
        self.decode = torch.compile(lambda codes: model.decode(codes, backend="reference"), dynamic=True)
        self.forward = torch.compile(lambda x: trainer(x, backend="reference"), dynamic=True)


def _encode(model: MultiScaleResidualQuantizer, x: Tensor, sizes: Sizes, compiled: _Compiled | None) -> Case:
    variants = {
        "ours": lambda: model.encode(x),
        "eager": lambda: model.encode(x, backend="reference"),
    }
    if compiled:
        variants["compile"] = lambda: compiled.encode(x)
    exact = _exact_codes(model, x)

    def check() -> str:
        return "; ".join(filter(None, (_codes_differ(name, exact, run()) for name, run in variants.items())))

    read_and_written = sizes.sequence_bytes + _weight_bytes(model) + 8 * sizes.tokens
    return Case("encode", sizes.name, variants, check, sizes.search_flops, read_and_written, asdict(sizes))


def _decode(model: MultiScaleResidualQuantizer, x: Tensor, sizes: Sizes, compiled: _Compiled | None) -> Case:
    codes = model.encode(x)
    variants = {
        "ours": lambda: model.decode(codes),
        "eager": lambda: model.decode(codes, backend="reference"),
    }
    if compiled:
        variants["compile"] = lambda: compiled.decode(codes)
    used = sum(codes[:, part].unique().numel() for part in sizes.schedule.slices())
    phi = _weight_bytes(model) - model.codebooks.nbytes
    read_and_written = 8 * sizes.tokens + 4 * used * sizes.latent + phi + sizes.sequence_bytes
    return Case(
        "decode", sizes.name, variants, lambda: _values_differ(variants), sizes.phi_flops, read_and_written,
        asdict(sizes),
    )  # fmt: skip


def _training(model: MultiScaleResidualQuantizer, x: Tensor, sizes: Sizes, compiled: _Compiled | None) -> Case:
    """Forward, backward and the update of the codebooks."""

    def step(forward: Callable) -> Callable[[], Tensor]:
        def run() -> Tensor:
            inputs = x.clone().requires_grad_()
            model.zero_grad(set_to_none=True)
            quantized, _, loss = forward(inputs)
            (quantized.square().mean() + loss).backward()
            return loss.detach()

        return run

    variants = {
        "ours": step(lambda inputs: model(inputs)),
        "eager": step(lambda inputs: model(inputs, backend="reference")),
    }
    if compiled:
        variants["compile"] = step(compiled.forward)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def check() -> str:
        losses = {}
        for name, run in variants.items():
            model.load_state_dict(state)
            losses[name] = run()
        return _far(losses)

    # phi once forward, and once for its gradient. Sequences: x, quantized, and the gradients of both. Averages and
    # codebooks are read and written.
    flops = sizes.search_flops + 2 * sizes.phi_flops
    averages = 2 * (model.embed_avg.nbytes + model.codebooks.nbytes + model.cluster_size.nbytes)
    phi = 2 * (_weight_bytes(model) - model.codebooks.nbytes)
    read_and_written = 4 * sizes.sequence_bytes + 8 * sizes.tokens + averages + phi
    return Case("training step", sizes.name, variants, check, flops, read_and_written, asdict(sizes))


def _vector_quantize_pytorch(x: Tensor, sizes: Sizes) -> Iterator[Case]:
    try:
        from vector_quantize_pytorch import HierarchicalVQ, ResidualVQ
    except ImportError:
        return
    theirs = HierarchicalVQ(
        dim=sizes.latent, codebook_size=sizes.codes, scales=sizes.schedule.lengths, shared_codebook=False,
        share_quant_resi=1, kmeans_init=False,
    ).eval()  # fmt: skip
    ours = _quantizer(sizes, phi_kernel_sizes=(3,), phi_sharing="full").eval().requires_grad_(False)
    with torch.no_grad():
        ours.codebooks.copy_(torch.stack([vq._codebook.embed[0] for vq in theirs.vqs]))
        ours.phi[0].weight.copy_(theirs.phi_shared.conv.weight)
        ours.phi[0].bias.copy_(theirs.phi_shared.conv.bias)
    yield _peer("HierarchicalVQ encode", ours, x, lambda: torch.cat(theirs(x)[1], dim=1), sizes)

    levels = ScaleSchedule((sizes.length,) * 8)
    theirs_plain = ResidualVQ(
        dim=sizes.latent, codebook_size=sizes.codes, num_quantizers=8, kmeans_init=False
    ).eval()  # fmt: skip
    plain = _quantizer(sizes, schedule=levels, phi_kernel_sizes=()).eval()
    with torch.no_grad():
        plain.codebooks.copy_(torch.stack([layer._codebook.embed[0] for layer in theirs_plain.layers]))
    yield _peer(
        "ResidualVQ 8 encode", plain, x, lambda: theirs_plain(x.mT)[1].permute(0, 2, 1).flatten(1), sizes
    )  # fmt: skip


def _peer(name: str, ours: MultiScaleResidualQuantizer, x: Tensor, theirs: Variant, sizes: Sizes) -> Case:
    @torch.no_grad()
    def run() -> Tensor:
        return theirs()

    exact = _exact_codes(ours, x)
    variants = {"ours": lambda: ours.encode(x), "vector-quantize-pytorch": run}

    def check() -> str:
        return "; ".join(filter(None, (_codes_differ(label, exact, go()) for label, go in variants.items())))

    flops = sizes.batch * ours.schedule.flops(sizes.latent, sizes.codes)
    read_and_written = sizes.sequence_bytes + _weight_bytes(ours) + 8 * exact.numel()
    return Case(name, sizes.name, variants, check, flops, read_and_written, asdict(sizes))


def _weight_bytes(model: MultiScaleResidualQuantizer) -> int:
    return sum(weight.nbytes for weight in model.levels.weights)


def _exact_codes(model: MultiScaleResidualQuantizer, x: Tensor) -> Tensor:
    """The float64 reference's codes."""
    levels = model.levels
    double = Levels(
        levels.schedule, levels.codebooks.double(), [weight.double() for weight in levels.phi_weights],
        [bias.double() for bias in levels.phi_biases], levels.phi_index,
    )  # fmt: skip
    return encode(x.double(), double, backend="reference")


def _codes_differ(name: str, exact: Tensor, codes: Tensor) -> str:
    """An item whose code was decided by rounding goes its own way from there: few items may, and late. The tests hold
    every single code to its float64 margin; this guards against a benchmark of something else."""
    wrong = (codes != exact).any(dim=1).float().mean().item()
    return f"{name}: {wrong:.1%} of items have codes other than float64's" if wrong > 0.1 + 1 / len(codes) else ""


def _values_differ(variants: dict[str, Variant]) -> str:
    return _far({name: run() for name, run in variants.items()})


def _far(values: dict[str, Tensor]) -> str:
    truth = values["eager"]
    for name, value in values.items():
        error = ((value - truth).norm() / truth.norm()).item()
        if not error < 1e-4:
            return f"{name}: relative difference {error:.1e} from eager"
    return ""
