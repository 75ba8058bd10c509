"""Multi-scale residual quantization against plain PyTorch, torch.compile of it, and vector-quantize-pytorch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..quantization import Levels, MultiScaleResidualQuantizer, encode
from ..schedule import ScaleSchedule
from .measure import Case, Variant

FRAMES, CODES = 75, 1024
PUBLISHED = ScaleSchedule.quadratic(16, FRAMES)


def cases(options: Namespace) -> Iterator[Case]:
    for latent in options.latent:
        torch.manual_seed(0)
        model = _quantizer(latent).eval().requires_grad_(False)
        trainer = _quantizer(latent)
        compile_all = None if options.no_compile else _Compiled(model, trainer)
        for batch in options.batch:
            x = torch.randn(batch, latent, FRAMES)
            yield _encode(model, x, compile_all)
            yield _decode(model, x, compile_all)
            yield _training(trainer, x, compile_all)
            yield from _vector_quantize_pytorch(x)


def _quantizer(latent: int, **options) -> MultiScaleResidualQuantizer:
    return MultiScaleResidualQuantizer(
        latent, schedule=PUBLISHED, codebook_size=CODES, kmeans_init=False, dead_code_threshold=0, **options
    )


class _Compiled:
    """torch.compile of the reference, once for all batch sizes: what a user without kernels would try first."""

    def __init__(self, model: MultiScaleResidualQuantizer, trainer: MultiScaleResidualQuantizer):
        self.encode = torch.compile(lambda x: model.encode(x, backend="reference"), dynamic=True)
        self.decode = torch.compile(lambda codes: model.decode(codes, backend="reference"), dynamic=True)
        self.forward = torch.compile(lambda x: trainer(x, backend="reference"), dynamic=True)


def _encode(model: MultiScaleResidualQuantizer, x: Tensor, compiled: _Compiled | None) -> Case:
    variants = {
        "ours": lambda: model.encode(x),
        "eager": lambda: model.encode(x, backend="reference"),
    }
    if compiled:
        variants["compile"] = lambda: compiled.encode(x)
    exact = _exact_codes(model, x)

    def check() -> str:
        return "; ".join(filter(None, (_codes_differ(name, exact, run()) for name, run in variants.items())))

    return Case("encode", _shape(x), variants, check, len(x) * PUBLISHED.flops(x.shape[1], CODES))


def _decode(model: MultiScaleResidualQuantizer, x: Tensor, compiled: _Compiled | None) -> Case:
    codes = model.encode(x)
    variants = {
        "ours": lambda: model.decode(codes),
        "eager": lambda: model.decode(codes, backend="reference"),
    }
    if compiled:
        variants["compile"] = lambda: compiled.decode(codes)
    # phi as a convolution at the rate of the codes: the fewest operations without a table of weights times codes
    flops = 2 * len(x) * PUBLISHED.total * 9 * x.shape[1] ** 2
    return Case("decode", _shape(x), variants, lambda: _values_differ(variants), flops)


def _training(model: MultiScaleResidualQuantizer, x: Tensor, compiled: _Compiled | None) -> Case:
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

    search = len(x) * PUBLISHED.flops(x.shape[1], CODES)
    phi = 2 * len(x) * PUBLISHED.total * 9 * x.shape[1] ** 2  # once forward, once for the gradient
    return Case("training step", _shape(x), variants, check, search + 2 * phi)


def _vector_quantize_pytorch(x: Tensor) -> Iterator[Case]:
    try:
        from vector_quantize_pytorch import HierarchicalVQ, ResidualVQ
    except ImportError:
        return
    latent = x.shape[1]
    theirs = HierarchicalVQ(
        dim=latent, codebook_size=CODES, scales=PUBLISHED.lengths, shared_codebook=False, share_quant_resi=1,
        kmeans_init=False,
    ).eval()  # fmt: skip
    ours = _quantizer(latent, phi_kernel_sizes=(3,), phi_sharing="full").eval().requires_grad_(False)
    with torch.no_grad():
        ours.codebooks.copy_(torch.stack([vq._codebook.embed[0] for vq in theirs.vqs]))
        ours.phi[0].weight.copy_(theirs.phi_shared.conv.weight)
        ours.phi[0].bias.copy_(theirs.phi_shared.conv.bias)
    yield _peer("HierarchicalVQ encode", ours, x, lambda: torch.cat(theirs(x)[1], dim=1))

    levels = ScaleSchedule((FRAMES,) * 8)
    theirs_plain = ResidualVQ(dim=latent, codebook_size=CODES, num_quantizers=8, kmeans_init=False).eval()
    plain = MultiScaleResidualQuantizer(
        latent, schedule=levels, codebook_size=CODES, phi_kernel_sizes=(), kmeans_init=False
    ).eval()
    with torch.no_grad():
        plain.codebooks.copy_(torch.stack([layer._codebook.embed[0] for layer in theirs_plain.layers]))
    yield _peer("ResidualVQ 8 encode", plain, x, lambda: theirs_plain(x.mT)[1].permute(0, 2, 1).flatten(1))


def _peer(name: str, ours: MultiScaleResidualQuantizer, x: Tensor, theirs: Variant) -> Case:
    @torch.no_grad()
    def run() -> Tensor:
        return theirs()

    exact = _exact_codes(ours, x)
    variants = {"ours": lambda: ours.encode(x), "vector-quantize-pytorch": run}

    def check() -> str:
        return "; ".join(filter(None, (_codes_differ(label, exact, go()) for label, go in variants.items())))

    flops = len(x) * ours.schedule.flops(x.shape[1], CODES)
    return Case(name, _shape(x), variants, check, flops)


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


def _shape(x: Tensor) -> str:
    return f"batch {len(x)}, latent {x.shape[1]}"
