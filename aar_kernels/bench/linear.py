"""Linear layers with packed weights at inference, against PyTorch's own, and oneDNN's with prepacked weights.

The layers are those of an AAR of depth 16. Each variant goes through so many copies of its weight that they come from
memory, as they do in a model. Weights in bf16 and int8 are compared with what one would run without them: the same
numbers in fp32. On CUDA also fp8; x is bf16 by narrow weights, and a run is one pass over the copies, so that a graph
of it reads from memory too. "compile" is torch.compile of widening a weight and multiplying.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import linear, pack
from . import shapes
from .measure import Case, Variant

LAYERS = ((1024, 3072, None), (1024, 1024, None), (1024, 4096, "gelu_tanh"), (4096, 1024, None))  # K, N, activation
ROWS = (1, 2, 12, 24, 62, 150)
SWEPT_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WORKING_SET = 96 * 2**20  # bytes of all copies of a weight: three times this machine's last-level cache


@dataclass(frozen=True)
class Sizes:
    rows: int
    K: int
    N: int


def cases(options: Namespace) -> Iterator[Case]:
    """Batches are those of the operators before it: here the numbers of rows are given."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    layers, rows, working_set = LAYERS, ROWS, WORKING_SET
    if options.shapes == "small":
        layers, rows, working_set = ((100, 200, None), (200, 100, "gelu_tanh")), (1, 12), 2**18
    elif options.shapes == "sweep":
        layers, rows = LAYERS[2:3], SWEPT_ROWS if options.sweep is None or "rows" in options.sweep else ()
    for K, N, activation in layers:
        weight, bias = torch.randn(N, K, generator=generator) / K**0.5, torch.randn(N, generator=generator)
        on_cuda = weight.is_cuda
        fp8 = (torch.float8_e4m3fn,) if on_cuda else ()
        for dtype in shapes.dtypes(options, (torch.float32, torch.bfloat16, torch.int8, *fp8)):
            for count in rows:
                x = torch.randn(count, K, generator=generator)
                layers = _layers(weight, bias, activation, dtype, count, working_set)
                if on_cuda and not options.no_compile and dtype != torch.float32:
                    layers["compile"] = _compiled(weight, bias, activation, dtype, len(layers["ours"]))
                if on_cuda and dtype != torch.float32:
                    x = x.bfloat16()
                times = len(layers["ours"]) if on_cuda else 1
                yield _case(_variants(x, layers, times), Sizes(count, K, N), activation, dtype, times)


Layer = Callable[[Tensor], Tensor]


def _layers(
    weight: Tensor, bias: Tensor, activation: str | None, dtype: torch.dtype, rows: int, working_set: int
) -> dict[str, list[Layer]]:
    """Each variant as a list of copies of the layer, whose weights take ``working_set`` bytes; on CUDA all variants
    have as many."""

    def ours() -> Layer:
        packed = pack(weight, dtype=dtype)
        return lambda x: linear(x, packed, bias, activation=activation)

    def eager(dtype: torch.dtype) -> Callable[[], Layer]:
        def make() -> Layer:
            copy, bias_copy = numbers.to(dtype, copy=True), bias.to(dtype)
            if activation is None:
                return lambda x: F.linear(x.to(dtype), copy, bias_copy)
            return lambda x: F.gelu(F.linear(x.to(dtype), copy, bias_copy), approximate="tanh")

        return make

    def onednn() -> Layer:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # in the layout that it prefers for them
        fused = ("none", [], "") if activation is None else ("gelu", [], "tanh")
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, *fused)

    numbers, count = pack(weight, dtype=dtype).dequantize(), weight.numel()
    makers = {"ours": (ours, dtype.itemsize), "eager fp32": (eager(torch.float32), 4)}
    if dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        makers["oneDNN, prepacked"] = (onednn, 4)
    if dtype == torch.bfloat16 or (dtype != torch.float32 and weight.is_cuda):
        makers["eager bf16"] = (eager(torch.bfloat16), 2)
    if weight.is_cuda:
        makers = {name: (make, dtype.itemsize) for name, (make, _) in makers.items()}
    return {
        name: [make() for _ in range(-(-working_set // (size * count)))] for name, (make, size) in makers.items()
    }


def _compiled(
    weight: Tensor, bias: Tensor, activation: str | None, dtype: torch.dtype, copies: int
) -> list[Layer]:  # fmt: skip
    torch._dynamo.reset()  # what was compiled for other sizes is of no more use

    @torch.compile(dynamic=False)
    def run(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
        y = F.linear(x, rows.to(x.dtype))
        y = (y if scale is None else y * scale.to(x.dtype)) + narrow
        return y if activation is None else F.gelu(y, approximate="tanh")

    narrow, packed = bias.bfloat16(), [pack(weight, dtype=dtype) for _ in range(copies)]
    return [lambda x, each=each: run(x, each.rows, each.scale) for each in packed]


def _variants(x: Tensor, layers: dict[str, list[Layer]], times: int) -> dict[str, Variant]:
    """A run of each is ``times`` layers."""

    def variant(copies: list[Layer]) -> Variant:
        turn = cycle(copies)

        @torch.no_grad()
        def run() -> Tensor:
            for _ in range(times):
                y = next(turn)(x)
            return y

        return run

    return {name: variant(copies) for name, copies in layers.items()}


def _case(
    variants: dict[str, Variant], sizes: Sizes, activation: str | None, dtype: torch.dtype, times: int
) -> Case:  # fmt: skip
    def check() -> str:
        results = {name: run() for name, run in variants.items()}
        exact = results["eager fp32"]
        for name, result in results.items():
            error = ((result.float() - exact).norm() / exact.norm()).item()
            if not error < (2e-2 if result.dtype == torch.bfloat16 else 1e-5):  # those round x or the result
                return f"{name}: relative difference {error:.1e} from eager fp32"
        return ""

    rows, K, N = asdict(sizes).values()
    name = f"linear, {str(dtype).removeprefix('torch.')}" + (", gelu" if activation else "")
    flops, numbers = times * 2 * rows * N * K, times * (4 * rows * (K + N) + dtype.itemsize * N * K)
    shape = f"{K}->{N}, {rows} rows" + (f", {times} layers" if times > 1 else "")
    return Case(name, shape, variants, check, flops, numbers, asdict(sizes))
