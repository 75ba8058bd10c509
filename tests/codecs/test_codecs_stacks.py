"""Convolutional stacks of other packages' autoencoders, accelerated."""

import copy
import functools

import pytest
import torch
from codec_cases import fill
from codec_packages import load
from torch import nn

import aar_kernels as ak
from aar_kernels.codecs.adapter import Adapter
from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Stream
from aar_kernels.seanet.encodec import encodec_layers

transformers = pytest.importorskip("transformers")


def encodec(**others) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 64, "upsampling_ratios": [4, 2]}
    config = transformers.EncodecConfig(**{**sizes, "target_bandwidths": [18.0], **others})
    return fill(transformers.EncodecModel(config).eval())


def original(package: str, kind: str, **options) -> nn.Module:
    """``SEANetEncoder`` or ``SEANetDecoder`` of `encodec` or `moshi`, with random weights."""
    module = load(f"{package}.modules.seanet")
    torch.manual_seed(0)
    sizes = {"channels": 1, "dimension": 16, "n_filters": 4, "ratios": [4, 2]}
    with torch.no_grad():
        net = getattr(module, f"SEANet{kind}")(**{**sizes, **options}).eval()
        for name, parameter in net.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2)
            elif name.endswith("norm.bias"):
                parameter.normal_()
    return net


def mimi(**others) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 2], "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16}
    config = transformers.MimiConfig(**{**sizes, **heads, "upsample_groups": 16, **others})
    return transformers.MimiModel(config).eval()


def waves(length: int = 700, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, length, generator=torch.Generator().manual_seed(length))


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Both are float32 sums of some hundred terms, layer after layer."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 8, 64, 333, 5000])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_causal_conv": False}, {"pad_mode": "constant"}, {"num_residual_layers": 2, "num_lstm_layers": 1},
        {"norm_type": "time_group_norm", "use_causal_conv": False},
    ],
)  # fmt: skip
def test_encoder_and_decoder(options, length):
    model = encodec(**options)
    wav = waves(length)
    try:
        latents = model.encoder(wav)
    except RuntimeError:
        pytest.skip("the original cannot pad so short a wave")
    before = latents, model.decoder(latents)
    report = ak.accelerate(model)
    assert {entry.path for entry in report.replaced} == {"quantizer", "encoder", "decoder"}
    assert not report.left
    assert_near(model.encoder(wav), before[0])
    assert_near(model.decoder(latents), before[1])
    ak.restore(model)
    assert torch.equal(model.encoder(wav), before[0])


ORIGINALS = {
    "encodec 24 kHz": functools.partial(original, "encodec", causal=True),
    "encodec 48 kHz": functools.partial(original, "encodec", channels=2, norm="time_group_norm"),
    "encodec, other options": functools.partial(
        original, "encodec", pad_mode="constant", true_skip=True, n_residual_layers=2, compress=1, lstm=0
    ),
    "moshi": functools.partial(original, "moshi", causal=True, pad_mode="constant"),
    "moshi, weight norm": functools.partial(
        original, "moshi", causal=True, pad_mode="constant", norm="weight_norm", true_skip=False, n_residual_layers=1
    ),
}  # fmt: skip


def only_the_probe(net, monkeypatch):
    """From now on the original may run on one item alone, as it does each time that weights are packed. Returns it."""
    original = type(net)._aar_original.forward

    def forward(self, x):
        return original(self, x) if len(x) == 1 else pytest.fail("the original ran")

    monkeypatch.setattr(type(net)._aar_original, "forward", forward)
    return original


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_stacks_of_the_original_packages(name, kind, monkeypatch):
    net = ORIGINALS[name](kind)
    channels = net.channels if kind == "Encoder" else net.dimension
    inputs = [torch.randn(2, channels, length) for length in (8, 64, 328)]
    before = [net(x) for x in inputs]
    report = ak.accelerate(net)
    assert len(report.replaced) == 1, report
    original_forward = only_the_probe(net, monkeypatch)
    for x, theirs in zip(inputs, before, strict=True):
        assert_near(net(x), theirs)
    parameter = next(p for p_name, p in net.named_parameters() if p_name.endswith(("weight_v", "weight")))
    parameter.mul_(-1.5)  # weights are read live, weight norm of the old kind among them
    ours = net(inputs[1])
    monkeypatch.setattr(type(net)._aar_original, "forward", original_forward)
    ak.restore(net)
    assert_near(ours, net(inputs[1]))
    assert not torch.allclose(ours, before[1])


CAUSAL = {
    "encodec": functools.partial(original, "encodec", causal=True),
    "transformers EnCodec": lambda kind: getattr(encodec(), kind.lower()),
    "transformers EnCodec, zeros": lambda kind: getattr(encodec(pad_mode="constant"), kind.lower()),
    "transformers Mimi": lambda kind: getattr(getattr(mimi(), kind.lower()), f"{kind.lower()}_seanet"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("name", CAUSAL)
def test_streams_end_as_the_originals_do(name, kind):
    """A last chunk of any length is padded as the originals pad a whole signal. (moshi's refuse such a signal.)"""
    net = CAUSAL[name](kind)
    stream = Stream(packed := PackedSEANet(encodec_layers(net)))
    assert stream.hop == (8 if kind == "Encoder" else 1)
    size = -(-stream.first // stream.hop) * stream.hop
    for length in range(size, 4 * size, 3):
        x = torch.randn(2, packed.inputs, length, generator=torch.Generator().manual_seed(length))
        *chunks, rest = x.split(size, dim=2)
        streamed = torch.cat([*map(stream, chunks), stream(rest, last=True)], 2)
        assert_near(streamed, net(x))


@torch.no_grad()
def test_moshi_streams_with_its_own_code():
    encoder, decoder = (ORIGINALS["moshi"](kind) for kind in ("Encoder", "Decoder"))
    wav = waves(64)
    latents = encoder(wav)
    sound = decoder(latents)
    for net in (encoder, decoder):
        ak.accelerate(net)
    with encoder.streaming(2), decoder.streaming(2):
        chunks = [encoder(chunk) for chunk in wav.split(16, dim=-1)]
        assert_near(torch.cat(chunks, -1), latents)
        assert_near(torch.cat([decoder(chunk) for chunk in chunks], -1), sound)
    assert_near(encoder(wav), latents)
    with pytest.raises(AssertionError, match="multiple of stride"):
        encoder(wav[..., :-1])


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"pad_mode": "reflect", "use_conv_shortcut": True}, {"use_causal_conv": False}]
)
def test_mimi(options):
    model = mimi(**options)
    encoder, decoder = model.encoder.encoder_seanet, model.decoder.decoder_seanet
    inputs = [waves(length) for length in (9, 64, 700)]
    before = [(encoder(x), decoder(encoder(x))) for x in inputs]
    report = ak.accelerate(model)
    assert {"encoder.encoder_seanet", "decoder.decoder_seanet"} <= {entry.path for entry in report.replaced}
    for x, (latents, sound) in zip(inputs, before, strict=True):
        assert_near(encoder(x), latents)
        assert_near(decoder(latents), sound)


@torch.no_grad()
def test_mimi_streams_with_its_own_code():
    model = mimi(codebook_size=64, num_quantizers=4)
    fill(model)

    def chunks():
        out, caches = [], {}
        for chunk in (30 * waves(4 * 64)).split(64, dim=-1):
            step = model.encode(chunk, use_streaming=True, **caches)
            caches = {"encoder_cache": step.encoder_cache, "padding_cache": step.padding_cache}
            out.append(step.audio_codes)
        return torch.cat(out, -1)

    before = chunks()
    ak.accelerate(model)
    assert torch.equal(chunks(), before)


@torch.no_grad()
def test_weights_are_read_live():
    model, other = encodec(), encodec()
    for parameter in other.parameters():
        parameter.mul_(1.1)
    ak.accelerate(model)
    before = model.encoder(waves())
    model.load_state_dict(other.state_dict())
    assert_near(model.encoder(waves()), other.encoder(waves()))
    assert not torch.allclose(before, other.encoder(waves()))
    copied = copy.deepcopy(model)
    assert isinstance(copied.encoder, Adapter)
    assert torch.equal(copied.encoder(waves()), model.encoder(waves()))


def test_gradients_run_the_original():
    model = encodec()
    plain = model.encoder(waves())
    plain.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.encoder.parameters()]
    model.zero_grad()
    ak.accelerate(model)
    ours = model.encoder(waves())
    assert torch.equal(ours, plain)
    ours.square().sum().backward()
    for parameter, gradient in zip(model.encoder.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@torch.no_grad()
def test_other_dtypes_run_the_original():
    model = encodec()
    ak.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.encoder(waves())
    model.double()
    outside = model.encoder(waves().double())
    ak.restore(model)
    assert torch.equal(model.encoder(waves().double()), outside)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.float().encoder(waves()), inside)


def test_what_cannot_be_expressed_is_left_alone():
    model = encodec()
    model.decoder.layers[0].pad_mode = "replicate"
    left = {entry.path: entry.reason for entry in ak.accelerate(model).left}
    assert set(left) == {"decoder"}
    assert "no layer of this package is a EncodecConv1d such as this" in left["decoder"]
    left = ak.accelerate(original("encodec", "Decoder", final_activation="Tanh")).left
    assert ["Tanh" in entry.reason for entry in left] == [True]
    left = ak.accelerate(original("encodec", "Encoder", norm="layer_norm")).left
    assert ["ConvLayerNorm" in entry.reason for entry in left] == [True]
    report = ak.accelerate(encodec().double())
    assert "float64" in {entry.path: entry.reason for entry in report.left}["encoder"]


@torch.no_grad()
def test_a_stack_that_does_more_than_its_layers_is_left_alone():
    model = encodec()
    model.encoder.register_forward_hook(lambda module, inputs, output: output)  # hooks stay, and run
    model.decoder.layers[-1].register_forward_hook(lambda module, inputs, output: 2 * output)
    report = ak.accelerate(model)
    left = {entry.path: entry.reason for entry in report.left}
    assert set(left) == {"decoder"}
    assert "probe" in left["decoder"]


@torch.no_grad()
def test_the_patch_mapping_of_transformers(tmp_path, monkeypatch):
    """Models that transformers builds, or loads, from our classes in place of its own."""
    patching = pytest.importorskip("transformers.monkey_patching")
    original = mimi(codebook_size=64, num_quantizers=4)
    fill(original)
    original.save_pretrained(tmp_path)
    wav = 30 * waves(256)
    before, latents = original.encode(wav).audio_codes, original.encoder.encoder_seanet(wav)
    mapping = ak.codecs.patch_mapping()
    assert {"^MimiEncoder$", "^MimiDecoder$", "^MimiResidualVectorQuantizer$", "^EncodecEncoder$"} <= set(mapping)
    patching.register_patch_mapping(mapping)
    try:
        with patching.apply_patches():
            built = transformers.MimiModel(original.config).eval()
        built.load_state_dict(original.state_dict())
        loaded = transformers.MimiModel.from_pretrained(tmp_path).eval()
        with patching.apply_patches():
            odd = transformers.EncodecModel(transformers.EncodecConfig(num_filters=4, trim_right_ratio=0.5)).eval()
    finally:
        patching.unregister_patch_mapping(list(mapping))
    assert not isinstance(transformers.MimiModel(original.config).encoder.encoder_seanet, Adapter)
    for model in (built, loaded):
        adapters = [name for name, module in model.named_modules() if isinstance(module, Adapter)]
        assert len(adapters) == 4, adapters
        assert_near(model.encoder.encoder_seanet(wav), latents)
        assert torch.equal(model.encode(wav).audio_codes, before)
        assert not ak.accelerate(model).left
        ak.restore(model)
        assert not any(isinstance(module, Adapter) for module in model.modules())
    # What the operators lack is found at the call, and is the package's.
    z = torch.randn(1, 128, 5)
    ours = odd.decoder(z)
    ak.restore(odd)
    assert torch.equal(ours, odd.decoder(z))
