"""``python -m benchmarks.codec``: whole codecs, one second of audio per item: encode and decode, against plain PyTorch.

SAT in the published sizes and in those of configs/small-sat.yaml, quantizer included, and the autoencoders of EnCodec
(24 kHz, and 48 kHz in stereo), of Mimi (without its transformers) and of DAC (44 kHz) as the package `transformers`
builds them. Weights are random. First every variant is checked against eager PyTorch in float64. With ``--layers``
each layer is timed too, without its norm over time if it has one, against the machine's large matrix product: its
GFLOP/s count what the direct convolution computes, so that a layer with fewer multiplications can be above 100 %. With
``--device cuda`` ours is the Triton backend, and it and eager PyTorch, which has the TF32 of its defaults, are timed as
CUDA graphs too.
"""

from __future__ import annotations

import copy
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aar import SAT, SATConfig
from aar.models.seanet import SEANet
from aar_kernels import use_backend
from aar_kernels.bench.measure import Variant, add_graphs, interleaved, peak_memory
from aar_kernels.bench.run import COMPILER
from aar_kernels.precision import without_tf32
from aar_kernels.seanet import LSTM, PackedLSTM, PackedSEANet, Tanh, lstm, pack, pack_lstm, stack
from aar_kernels.seanet.dac import dac_layers
from aar_kernels.seanet.encodec import encodec_layers
from aar_kernels.seanet.normed import without_norms

from . import onnx_peer
from .common import parser, peaks, print_machine, print_row, write

SMALL = SATConfig(n_filters=16, lstm_layers=1, dim=256)
TRANSFORMERS = {  # what the encoder and the decoder take of one second
    "encodec": ("EnCodec 24 kHz", (1, 24000), (128, 75)),
    "encodec48": ("EnCodec 48 kHz", (2, 48000), (128, 150)),
    "mimi": ("Mimi", (1, 24000), (512, 25)),
    "dac": ("DAC 44 kHz", (1, 44032), (1024, 86)),  # 86 frames
}
CODECS = ("sat", "small", *TRANSFORMERS)
ROUNDING = {"ONNX Runtime": 1e-5}  # beyond four times eager's error, relative; its group norm of 48,000 steps needs it
Run = Callable[[Tensor], Tensor]


@dataclass
class Half:
    """Encoding or decoding: variants that compute the same from ``input(batch)``."""

    name: str
    network: nn.Module  # the encoder or decoder, weight norm folded
    steps: int  # that the network reads of one item
    input: Callable[[int], Tensor]
    variants: dict[str, Run]  # "ours" first


def main(argv: list[str] | None = None, config: SATConfig | None = None) -> int:
    options = parser("benchmarks.codec", __doc__)
    options.add_argument("--codec", nargs="+", choices=CODECS, default=list(CODECS), help="default: all")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="seconds at once (default: 1 8 32)")
    options.add_argument("--layers", action="store_true", help="also time each layer, at batch 1 and one thread")
    options.add_argument("--cpu-time", action="store_true", help="time one thread by its own clock, on a busy machine")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    options = options.parse_args(argv)
    with torch.device(options.device), torch._dynamo.config.patch(**COMPILER):
        return _run(options, config)


def _run(options: Namespace, config: SATConfig | None) -> int:
    print_machine()
    if onnx_peer.missing():
        print(f"ONNX Runtime is no peer: {', '.join(onnx_peer.missing())} not installed")
    rows, any_wrong = [], False
    for half in _halves(options.codec, options.no_compile, config):
        torch._dynamo.reset()
        any_wrong |= _drop_what_is_wrong(half)
        for threads in options.threads:
            torch.set_num_threads(threads)
            measured = peaks(options.device)
            clock = time.process_time if options.cpu_time and threads == 1 else time.perf_counter
            timing = {"runs": options.runs, "warmup": 1, "clock": clock}
            about = {"benchmark": "codec", "case": half.name, "threads": threads, "clock": clock.__name__, **measured}
            about["device"] = options.device
            for batch in options.batch:
                rows.append(about | _measure(half, batch, timing))
                print_row(rows[-1])
            if options.layers and threads == 1:
                rows.append(about | _measure_layers(half, timing))
                print_row(rows[-1])
    write(options.json, rows)
    return 1 if any_wrong else 0


# ---- what is compared ----


def _halves(codecs: list[str], no_compile: bool, config: SATConfig | None) -> Iterator[Half]:
    for name in codecs:
        if name in ("sat", "small"):
            sizes = config or (SATConfig() if name == "sat" else SMALL)
            yield from _sat(f"SAT {name}", sizes, no_compile)
        else:
            yield from _transformers(name, no_compile)


def _on_cuda() -> bool:
    return torch.get_default_device().type == "cuda"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def _ours(run: Run) -> Run:
    """On CUDA the Triton backend is used where it is asked for."""
    if not _on_cuda():
        return run

    def ours(x: Tensor) -> Tensor:
        with use_backend("triton"):
            return run(x)

    return ours


def _twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Two modules with equal weights. No deep copies: those of weight norm share the class that holds the weight."""
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(make().eval().requires_grad_(False))
    return modules[0], modules[1]


def _sat(name: str, config: SATConfig, no_compile: bool) -> Iterator[Half]:
    """What differs: the autoencoder, and in plain PyTorch the quantizer too."""
    model, folded = _twins(lambda: SAT(config))
    folded.fold_weight_norm()
    window, total = model.config.window_samples, model.config.schedule.total

    def waves(batch: int) -> Tensor:
        return 0.3 * torch.randn(batch, 1, window, generator=_generator(batch))

    def codes(batch: int) -> Tensor:
        return torch.randint(model.config.codebook_size, (batch, total), generator=_generator(batch))

    def encoding(encoder: nn.Module) -> Run:
        return lambda wav: folded.quantizer.encode(encoder(wav))

    def decoding(decoder: nn.Module) -> Run:
        return lambda codes: decoder(folded.quantizer.decode(codes))

    encode = {
        "ours": _ours(lambda wav: model.encode(wav)[:, 0]),
        "eager autoencoder, our quantizer": encoding(folded.encoder),
        "eager": _plain(encoding(folded.encoder)),
        "eager, weight norm": _plain(encoding(model.encoder)),
    }
    decode = {
        "ours": _ours(lambda codes: model.decode(codes[:, None])),
        "eager autoencoder, our quantizer": decoding(folded.decoder),
        "eager": _plain(decoding(folded.decoder)),
        "eager, weight norm": _plain(decoding(model.decoder)),
    }
    if not no_compile:
        encode["torch.compile, our quantizer"] = encoding(torch.compile(folded.encoder))
        decode["torch.compile, our quantizer"] = decoding(torch.compile(folded.decoder))
    yield Half(f"{name} encode", folded.encoder, window, waves, encode)
    yield Half(f"{name} decode", folded.decoder, model.config.schedule.length, codes, decode)


def _plain(run: Run) -> Run:
    def plain(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return run(x)

    return plain


def autoencoder(codec: str) -> nn.ModuleDict:
    import transformers

    if codec == "mimi":
        model = transformers.MimiModel(transformers.MimiConfig(num_hidden_layers=1))
        return nn.ModuleDict({"encoder": model.encoder.encoder_seanet, "decoder": model.decoder.decoder_seanet})
    if codec == "dac":
        # As the package initialises it, the signal is lost among biases behind a few layers.
        model = transformers.DacModel(transformers.DacConfig())
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                module.reset_parameters()
        return nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})
    stereo = {"audio_channels": 2, "use_causal_conv": False, "norm_type": "time_group_norm"}
    model = transformers.EncodecModel(transformers.EncodecConfig(**(stereo if codec == "encodec48" else {})))
    return nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})


def _transformers(codec: str, no_compile: bool) -> Iterator[Half]:
    model, folded = _twins(lambda: autoencoder(codec))
    for module in list(folded.modules()):
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    title, *shapes = TRANSFORMERS[codec]
    for (name, network), shape in zip(folded.items(), shapes, strict=True):
        variants: dict[str, Run] = {"ours": _ours(PackedSEANet(_layers(network))), "eager": network}
        if codec == "encodec":
            variants["eager, weight norm"] = model[name]
        if not no_compile:
            variants["torch.compile"] = torch.compile(network)
        if not onnx_peer.missing() and not _on_cuda():
            variants["ONNX Runtime"] = onnx_peer.onnx_runtime(network, torch.randn(1, *shape))

        def signals(batch: int, shape: tuple[int, int] = shape) -> Tensor:
            return 0.3 * torch.randn(batch, *shape, generator=_generator(batch))

        yield Half(f"{title} {name}", network, shape[1], signals, variants)


# ---- checking ----


@torch.no_grad()
@without_tf32()
def _drop_what_is_wrong(half: Half) -> bool:
    """Variants must be as right as eager PyTorch: numbers by their distance from float64, codes by how many differ."""
    x, wrong = half.input(2), {}
    results = {name: run(x) for name, run in half.variants.items()}
    if results["eager"].is_floating_point():
        exact = _exact(half, x)
        errors = {name: ((out - exact).norm() / exact.norm()).item() for name, out in results.items()}
        bounds = {name: 4 * errors["eager"] + ROUNDING.get(name, 1e-6) for name in errors}
        wrong = {
            name: f"off by {error:.1e}, allowed {bounds[name]:.1e}"
            for name, error in errors.items()
            if not error <= bounds[name]
        }
    else:
        for name, codes in results.items():
            differ = (codes != results["eager"]).float().mean().item()
            if differ > 0.01:  # a tie within rounding changes what finer scales see
                wrong[name] = f"{differ:.1%} other codes"
    for name, found in wrong.items():
        print(f"WRONG {half.name}, {name}: {found}; not timed", flush=True)
        del half.variants[name]
    return bool(wrong)


def _exact(half: Half, x: Tensor) -> Tensor:
    """What eager PyTorch computes, its network in float64."""
    captured = []
    hook = half.network.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    half.variants["eager"](x)
    hook.remove()
    return copy.deepcopy(half.network).double()(captured[0].double())


# ---- timing ----


def _layers(network: nn.Module) -> list:
    if isinstance(network, SEANet):
        return network.layers()
    return encodec_layers(network) if hasattr(network, "layers") else dac_layers(network)


def _packed(network: nn.Module) -> list:
    layers = [layer for layer in _layers(network) if not isinstance(layer, Tanh)]
    return [pack_lstm(layer) if isinstance(layer, LSTM) else pack([without_norms(layer)]) for layer in layers]


def _flops(part, length: int) -> int:
    if isinstance(part, PackedLSTM):
        return 16 * part.layers * part.channels**2 * length
    return part.fields[0].flops(length)


def _steps(part, length: int) -> int:
    return length if isinstance(part, PackedLSTM) else part.fields[0].length(length)


@torch.no_grad()
def _measure(half: Half, batch: int, timing: dict) -> dict:
    x = half.input(batch)
    variants: dict[str, Variant] = {name: _bound(run, x) for name, run in half.variants.items()}
    device = torch.get_default_device().type
    memory = {name: peak_memory(run, device) for name, run in variants.items()}
    if _on_cuda():
        add_graphs(variants, memory)
    length, flops = half.steps, 0
    for part in _packed(half.network):
        flops += batch * _flops(part, length)
        length = _steps(part, length)
    # The floor is that of the autoencoder alone.
    row = _timed(variants, dict.fromkeys(variants, flops), timing)
    return row | {"shape": f"batch {batch}", "flops": flops, "extra_mib": memory}


@torch.no_grad()
def _measure_layers(half: Half, timing: dict) -> dict:
    """Each layer alone, one item."""
    parts = _packed(half.network)
    x = torch.randn(1, parts[0].fields[0].inputs, half.steps)
    variants, flops = {}, {}
    for part in parts:
        run = lstm if isinstance(part, PackedLSTM) else stack
        name = f"{type(part).__name__.removeprefix('Packed')} {x.shape[1]} x {x.shape[2]}"
        if not isinstance(part, PackedLSTM):
            fields = part.fields[0]
            kind = ("conv", "transposed", "residual")[fields.kind]
            name = f"{kind} {fields.inputs}->{fields.outputs} k{fields.kernel} s{fields.stride}, {x.shape[2]} steps"
        variants[name] = _bound(lambda x, run=run, part=part: run(x, part), x)
        flops[name] = _flops(part, x.shape[2])
        x = run(x, part)
    row = _timed(variants, flops, timing)
    rates = {name: flops[name] / times["p50"] / 1e6 for name, times in row["times_ms"].items()}
    return row | {"shape": "its layers, batch 1", "gflops": rates}


def _timed(variants: dict[str, Variant], flops: dict[str, int], timing: dict) -> dict:
    """Times, and the floor of each variant: its arithmetic at the rate of a large matrix product, timed in turn."""
    side, device = 4096 if _on_cuda() else 1024, torch.get_default_device().type
    square = torch.randn(side, side)
    times = interleaved({"product": lambda: square @ square, **variants}, 0, device, **timing)
    peak = 2 * side**3 / times.pop("product")["p20"] / 1e6
    return {"times_ms": times, "floor_ms": {name: flops[name] / peak / 1e6 for name in times}, "peak_gflops": peak}


def _bound(run: Run, x: Tensor) -> Variant:
    return lambda: run(x)


if __name__ == "__main__":
    sys.exit(main())
