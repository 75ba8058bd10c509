"""Convolutional stacks of other packages' autoencoders, accelerated."""

import copy

import pytest
import torch
from codec_cases import fill
from torch import nn

import aar_kernels as ak
from aar_kernels.codecs.adapter import Adapter

transformers = pytest.importorskip("transformers")


def encodec(**others) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 64, "upsampling_ratios": [4, 2]}
    config = transformers.EncodecConfig(**{**sizes, "target_bandwidths": [18.0], **others})
    return fill(transformers.EncodecModel(config).eval())


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
    [{}, {"use_causal_conv": False}, {"pad_mode": "constant"}, {"num_residual_layers": 2, "num_lstm_layers": 1}],
)
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
    report = ak.accelerate(encodec(norm_type="time_group_norm"))
    left = {entry.path: entry.reason for entry in report.left}
    assert set(left) == {"encoder", "decoder"}
    assert "normalisation" in left["encoder"]
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
