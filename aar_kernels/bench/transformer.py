"""A transformer's blocks at inference, scale by scale: one call each, against a call per layer and plain PyTorch.

The sizes are those of the small AAR that ships, and of a quarter of the published one, with the published scales.
There is no `torch.compile` here: the length of the caches makes it compile anew for each scale.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import ScaleCache
from ..linear import pack
from ..schedule import ScaleSchedule
from ..transformer import Block, reference, step
from . import shapes
from .measure import Case
from .modulation import plain_modulate, plain_residual


@dataclass(frozen=True)
class Sizes:
    batch: int = 1
    depth: int = 6
    width: int = 192
    heads: int = 3
    scales: int = 16

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.quadratic(self.scales, 75)

    @property
    def flops(self) -> int:
        """Of the linear layers, a multiply-add being two, and of attention."""
        layers = 2 * 12 * self.width**2 * self.schedule.total
        ends = self.schedule.offsets[1:]
        pairs = sum(n * end for n, end in zip(self.schedule.lengths, ends, strict=True))
        return self.batch * self.depth * (layers + 4 * self.width * pairs)


SIZES = (Sizes(), Sizes(depth=4, width=1024, heads=16))


def cases(options: Namespace) -> Iterator[Case]:
    """On the CPU; on a GPU the layers run one by one within a CUDA graph, see `aar.AAR.sample`."""
    if options.device != "cpu" or torch.float32 not in shapes.dtypes(options, [torch.float32]):
        return
    small, *larger = (Sizes(depth=2, width=32, heads=2, scales=4),) if options.shapes == "small" else SIZES
    for batch in options.batch:
        yield _case(replace(small, batch=batch))
    for each in larger:  # a run of more than one item takes seconds, and is a matrix product
        yield _case(replace(each, batch=options.batch[0]))


Step = Callable[[Tensor, list[ScaleCache]], Tensor]


def _case(sizes: Sizes) -> Case:
    generator = torch.Generator().manual_seed(0)
    C = sizes.width
    shapes_of_layers = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layers = [[(draw(N, K) / K**0.5, draw(N)) for N, K in shapes_of_layers] for _ in range(sizes.depth)]
    modulations = [0.3 * draw(sizes.batch, 6 * C) for _ in layers] + [draw(sizes.batch, 2 * C)]
    parts = draw(sizes.batch, sizes.schedule.total, C).split(sizes.schedule.lengths, dim=1)
    blocks = [Block(*(pack(w) for w, _ in block), tuple(b for _, b in block)) for block in layers]

    def by_layer(x: Tensor, caches: list[ScaleCache]) -> Tensor:
        out = reference.step(x, blocks, modulations, caches, (C // sizes.heads) ** -0.5, 1e-6, "native")
        for cache in caches:
            cache.length += x.shape[1]
        return out

    functions: dict[str, Step] = {
        "ours": lambda x, caches: step(x, blocks, modulations, caches),
        "ours, a call per layer": by_layer,
        "eager": _Plain(layers, modulations),
    }
    variants = {name: _all_scales(function, parts, sizes) for name, function in functions.items()}

    def check() -> str:
        wide_layers = [[(weight.double(), bias.double()) for weight, bias in block] for block in layers]
        wide = _Plain(wide_layers, [modulation.double() for modulation in modulations])
        exact = _all_scales(wide, [part.double() for part in parts], sizes)()
        for name, run in variants.items():
            error = ((run().double() - exact).norm() / exact.norm()).item()
            if not error < 1e-5:
                return f"{name}: relative difference {error:.1e} from float64"
        return ""

    weights = 4 * 12 * C * C * sizes.depth
    shape = f"batch {sizes.batch}, depth {sizes.depth}, width {C}"
    return Case("transformer, all scales", shape, variants, check, sizes.flops, sizes.scales * weights, asdict(sizes))


def _all_scales(function: Step, parts: list[Tensor], sizes: Sizes) -> Callable[[], Tensor]:
    shape = (sizes.batch, sizes.schedule.total, sizes.heads, sizes.width // sizes.heads)
    caches = [ScaleCache.empty(*shape, dtype=parts[0].dtype) for _ in range(sizes.depth)]

    @torch.no_grad()
    def run() -> Tensor:
        for cache in caches:
            cache.reset()
        return torch.cat([function(part, caches) for part in parts], dim=1)

    return run


class _Plain:
    """As one writes it: SDPA on slices of caches that are allocated once."""

    def __init__(self, layers: list[list[tuple[Tensor, Tensor]]], modulations: list[Tensor]):
        self.layers, self.modulations = layers, modulations

    def __call__(self, x: Tensor, caches: list[ScaleCache]) -> Tensor:
        parts = [modulation.chunk(6, dim=-1) for modulation in self.modulations[:-1]]
        before = [(scale1, shift1) for _, _, scale1, _, shift1, _ in parts] + [self.modulations[-1].chunk(2, dim=-1)]
        y = plain_modulate(x, *before[0])
        for i, (qkv, proj, fc1, fc2) in enumerate(self.layers):
            gate1, gate2, _, scale2, _, shift2 = parts[i]
            y = F.linear(_attend(F.linear(y, *qkv), caches[i]), *proj)
            x, y = plain_residual(x, y, gate1, scale2, shift2)
            y = F.linear(F.gelu(F.linear(y, *fc1), approximate="tanh"), *fc2)
            x, y = plain_residual(x, y, gate2, *before[i + 1])
        return y


def _attend(qkv: Tensor, cache: ScaleCache) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, *cache.k.shape[2:])).unbind(2)
    end = cache.length + q.shape[1]
    cache.k[:, cache.length : end], cache.v[:, cache.length : end] = k, v
    cache.length = end
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, cache.k[:, :end], cache.v[:, :end])))
    return out.transpose(1, 2).flatten(2)
