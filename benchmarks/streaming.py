"""``python -m benchmarks.streaming``: time per frame of the autoencoders of EnCodec (24 kHz) and Mimi in a stream.

One frame of each at a time: 13.3 ms of sound for EnCodec, 80 ms for Mimi (without its transformers), of random weights.
The peer is what one writes in PyTorch: each layer keeps its context and takes it with the next frame. First all are
checked over some frames against eager PyTorch in float64, which has the whole signal.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aar_kernels.bench.measure import interleaved, read_bandwidth
from aar_kernels.seanet import LSTM, Conv, ConvTranspose, PackedSEANet, Residual, Stream
from aar_kernels.seanet.encodec import encodec_layers

from .codec import TRANSFORMERS, autoencoder
from .common import parser, print_machine, write

FRAMES = {  # milliseconds, and the steps that the encoder and the decoder take of them
    "encodec": (1000 / 75, {"encoder": 320, "decoder": 1}),
    "mimi": (80.0, {"encoder": 1920, "decoder": 2}),
}
CHECKED = 12  # frames
Step = Callable[[Tensor], Tensor]


def main(argv: list[str] | None = None, make: Callable[[str], nn.ModuleDict] = autoencoder) -> int:
    options = parser("benchmarks.streaming", __doc__)
    options.add_argument("--codec", nargs="+", choices=FRAMES, default=list(FRAMES), help="default: all")
    options.add_argument("--cpu-time", action="store_true", help="time one thread by its own clock, on a busy machine")
    options = options.parse_args(argv)

    print_machine()
    rows, any_wrong = [], False
    for codec in options.codec:
        milliseconds, sizes = FRAMES[codec]
        torch.manual_seed(0)
        for name, network in make(codec).eval().requires_grad_(False).items():
            case = f"{TRANSFORMERS[codec][0]} {name}"
            steps, wrong = checked(network, sizes[name])
            for variant, error in wrong.items():
                print(f"WRONG {case}, {variant}: {error}; not timed", flush=True)
            any_wrong |= bool(wrong)
            for threads in options.threads:
                torch.set_num_threads(threads)
                clock = time.process_time if options.cpu_time and threads == 1 else time.perf_counter
                times = interleaved(steps, 0, runs=20 * options.runs, warmup=5, clock=clock)
                shape = f"a frame of {milliseconds:.1f} ms"
                about = {"benchmark": "streaming", "case": case, "shape": shape, "threads": threads}
                about["clock"] = clock.__name__
                rows.append(about | {"frame_ms": milliseconds, "read_gbs": read_bandwidth(), "times_ms": times})
                print_row(rows[-1])
    write(options.json, rows)
    return 1 if any_wrong else 0


@torch.no_grad()
def checked(network: nn.Module, size: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """What runs a frame of each variant that is right, and what is wrong with the others."""
    net = PackedSEANet(layers := encodec_layers(network))
    variants: dict[str, Step] = {"ours": Stream(net), "PyTorch, layer by layer": EagerStream(layers)}
    first = -(-Stream(net).first // size) * size
    signal = 0.3 * torch.randn(1, net.inputs, first + CHECKED * size, generator=torch.Generator().manual_seed(0))
    frames = [signal[..., :first], *signal[..., first:].split(size, 2)]
    exact = copy.deepcopy(network).double()(signal.double())
    bound = 4 * _error(network(signal), exact) + 1e-6
    steps, wrong = {}, {}
    for name, step in variants.items():
        error = _error(torch.cat([step(frame) for frame in frames], 2), exact)
        if error <= bound:
            steps[name] = _each(step, frames[1:])
        else:
            wrong[name] = f"off by {error:.1e}, allowed {bound:.1e}"
    return steps, wrong


def _error(out: Tensor, exact: Tensor) -> float:
    return ((out - exact).norm() / exact.norm()).item()


def _each(step: Step, frames: list[Tensor]) -> Callable[[], Tensor]:
    following = cycle(frames)

    @torch.no_grad()
    def run() -> Tensor:
        return step(next(following))

    return run


def print_row(row: dict) -> None:
    about = f"{row['threads']} thread(s), {row['read_gbs']:.1f} GB/s read"
    print(f"\nstreaming: {row['case']}, {row['shape']}, {about}")
    print(f"{'variant':28} {'p50 (p20, p80) ms a frame':32} {'ratio':>7} {'of real time':>13}")
    first = next(iter(row["times_ms"].values()))["p50"] if row["times_ms"] else 0.0
    for name, times in row["times_ms"].items():
        spread = f"{times['p50']:.2f} ({times['p20']:.2f}, {times['p80']:.2f})"
        print(f"{name:28} {spread:32} {times['p50'] / first:6.2f}x {times['p50'] / row['frame_ms']:13.1%}", flush=True)


# ---- the peer ----


class EagerStream:
    """Causal layers of this package in plain PyTorch, each with its context. Frames are whole strides."""

    def __init__(self, layers: list):
        self._steps = [_eager(layer) for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = step(x)
        return x


def _eager(layer) -> Step:
    if isinstance(layer, Residual):
        first, narrow = _conv(layer.first), _conv(layer.narrow)
        shortcut = _conv(layer.shortcut) if layer.shortcut is not None else lambda x: x
        return lambda x: shortcut(x) + narrow(first(x))
    return {Conv: _conv, ConvTranspose: _transposed, LSTM: _lstm}[type(layer)](layer)


def _conv(layer: Conv) -> Step:
    context = layer.dilation * (layer.weight.shape[2] - 1) + 1 - layer.stride
    before = None

    def step(x: Tensor) -> Tensor:
        nonlocal before
        x = F.elu(x) if layer.elu else x
        if before is None:
            x = F.pad(x, (context, 0), mode="reflect" if layer.reflect else "constant")
        else:
            x = torch.cat([before, x], 2)
        before = x[..., x.shape[2] - context :]
        return F.conv1d(x, layer.weight, layer.bias, layer.stride, dilation=layer.dilation)

    return step


def _transposed(layer: ConvTranspose) -> Step:
    """What reaches beyond a frame is added to the next one."""
    overlap = layer.weight.shape[2] - layer.stride
    rest = None

    def step(x: Tensor) -> Tensor:
        nonlocal rest
        y = F.conv_transpose1d(F.elu(x) if layer.elu else x, layer.weight, None, layer.stride)
        if rest is not None:
            y[..., :overlap] += rest
        done = x.shape[2] * layer.stride
        rest = y[..., done:]
        return y[..., :done] if layer.bias is None else y[..., :done] + layer.bias[:, None]

    return step


def _lstm(layer: LSTM) -> Step:
    channels = layer.weights[0][0].shape[1]
    module = nn.LSTM(channels, channels, len(layer.weights)).requires_grad_(False)
    for ours, theirs in zip(module.all_weights, layer.weights, strict=True):
        for parameter, weight in zip(ours, theirs, strict=True):
            parameter.copy_(weight)
    state = None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        y, state = module(x.permute(2, 0, 1), state)
        y = y.permute(1, 2, 0)
        return x + y if layer.skip else y

    return step


if __name__ == "__main__":
    sys.exit(main())
