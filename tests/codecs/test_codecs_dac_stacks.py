"""DAC's encoder and decoder, and SNAC's, accelerated."""

import functools
import re

import pytest
import torch
from codec_packages import load
from helpers import assert_as_accurate
from test_codecs_stacks import only_the_probe, waves
from torch import nn

import aar_kernels as ak

transformers = pytest.importorskip("transformers")

DOWN = [2, 5, 3]


@torch.no_grad()
def spread(net: nn.Module) -> nn.Module:
    """Weights, biases and alphas of which each matters: as the packages initialise them, signals vanish."""
    generator = torch.Generator().manual_seed(0)
    for module in net.eval().modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            for name, parameter in module.named_parameters():
                scale = 0.5 if "weight_g" in name or "original0" in name else module.weight[0].numel() ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        elif isinstance(alpha := getattr(module, "alpha", None), nn.Parameter):
            alpha.copy_(0.3 + 1.5 * torch.rand(alpha.shape, generator=generator))
    return net


def dac() -> nn.Module:
    torch.manual_seed(0)
    return spread(transformers.DacModel(transformers.DacConfig(
        encoder_hidden_size=8, decoder_hidden_size=64, downsampling_ratios=DOWN, upsampling_ratios=DOWN[::-1],
        hidden_size=64, n_codebooks=3, codebook_size=32,
    )))  # fmt: skip


def exactly(run, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In float64, which is the package's own code."""
    net.double()
    result = run(x.double() if x.is_floating_point() else x)
    net.float()
    return result


def original(module: str, kind: str, **options) -> nn.Module:
    """``Encoder`` or ``Decoder`` of `dac` or `snac`."""
    make = getattr(load(module), kind)
    torch.manual_seed(0)
    return spread(make(8, DOWN, **options) if kind == "Encoder" else make(64, 64, DOWN[::-1], **options))


descript = functools.partial(original, "dac.model.dac")
snac = functools.partial(original, "snac.layers", attn_window_size=None)
CASES = {
    "transformers": lambda kind: getattr(dac(), kind.lower()),
    "dac": lambda kind: descript(kind, **({"d_latent": 64} if kind == "Encoder" else {})),
    "snac": snac,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("name", CASES)
def test_stacks(name, kind, monkeypatch):
    net = CASES[name](kind)
    inputs = [torch.randn(2, 1, n) for n in (30, 59, 701)] if kind == "Encoder" else [
        torch.randn(2, 64, n) for n in (1, 2, 23)
    ]  # fmt: skip
    before, exact = [net(x) for x in inputs], [exactly(net, net, x) for x in inputs]
    report = ak.accelerate(net)
    assert len(report.replaced) == 1, report
    original_forward = only_the_probe(net, monkeypatch)
    for x, *theirs in zip(inputs, before, exact, strict=True):
        assert_as_accurate(net(x), *theirs)
    ours = []
    for ending in ("alpha", ("weight_v", "weight", "original1")):  # both are read live
        next(p for p_name, p in net.named_parameters() if p_name.endswith(ending)).mul_(-1.5)
        ours.append(net(inputs[1]))
    monkeypatch.setattr(type(net)._aar_original, "forward", original_forward)
    ak.restore(net)
    assert_as_accurate(ours[1], net(inputs[1]), exactly(net, net, inputs[1]))
    assert not torch.allclose(ours[0], before[1])
    assert not torch.allclose(ours[1], ours[0])


@torch.no_grad()
@pytest.mark.parametrize("length", [600, 601, 629])
def test_a_whole_model(length):
    model, wav = dac(), waves(length)
    encoded, sound = model.encode(wav), model(wav).audio_values
    report = ak.accelerate(model)
    assert {entry.path for entry in report.replaced} == {"encoder", "decoder", "quantizer"}
    assert not report.left
    ours = model.encode(wav)
    assert (ours.audio_codes == encoded.audio_codes).float().mean() > 0.98  # all but those that rounding decides
    decoded = model.decode(audio_codes=ours.audio_codes).audio_values
    assert model(wav).audio_values.shape == sound.shape
    ak.restore(model)
    assert torch.equal(model.encode(wav).audio_codes, encoded.audio_codes)

    def decode(codes):
        return model.decode(audio_codes=codes).audio_values

    assert_as_accurate(decoded, decode(ours.audio_codes), exactly(decode, model, ours.audio_codes))


@torch.no_grad()
def test_too_short_a_wave_is_the_originals_to_refuse():
    model = dac()
    ak.accelerate(model)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        model.encoder(waves(1))


def test_gradients_run_the_original():
    model, wav = dac(), waves(60)
    plain = model.encoder(wav)
    ak.accelerate(model)
    ours = model.encoder(wav)
    assert torch.equal(ours, plain)
    ours.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("Encoder", {"depthwise": True}, "a convolution such as 8, 8, .* groups=8"),
        ("Decoder", {"noise": True}, "NoiseBlock"),
        ("Encoder", {"attn_window_size": 4}, "LocalMHA"),
    ],
)
def test_what_snac_has_beyond_dac_is_left_alone(kind, options, reason):
    net = snac(kind, **options)
    report = ak.accelerate(net)
    assert not report.replaced
    assert re.search(reason, report.left[0].reason)


@torch.no_grad()
def test_a_stack_that_does_more_than_its_layers_is_left_alone():
    model = dac()
    model.decoder.block[0].res_unit1.register_forward_hook(lambda module, inputs, output: 2 * output)
    left = {entry.path: entry.reason for entry in ak.accelerate(model).left}
    assert set(left) == {"decoder"}
    assert "probe" in left["decoder"]
