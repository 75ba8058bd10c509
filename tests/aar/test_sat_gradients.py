"""SAT's autoencoder in training on `aar_kernels.seanet.convolve`: gradients are those of its modules."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import error64, require
from small import AUTOENCODERS, noise, tiny_sat
from torch import Tensor, nn

from aar_kernels import use_backend


@pytest.fixture(autouse=True)
def native():
    return require("seanet_layer", "native")


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    network(x).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def convolutions(function) -> set[str]:
    with torch.profiler.profile() as profile:
        function()
    return {event.name for event in profile.events()} & {"aten::convolution", "aar_native::seanet_backward"}


@pytest.mark.parametrize("config", AUTOENCODERS)
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_gradients_are_those_of_the_modules(config, half):
    """Of both factors of weight norm too; relative to the largest number of each."""
    model = tiny_sat(1, config)
    network, latents = getattr(model, half), torch.randn(2, config.dim, config.schedule.length)
    x = noise(2, 1, config.window_samples) if half == "encoder" else latents
    ours = gradients(network, x)
    with use_backend("reference"):
        plain = gradients(network, x)
    exact = gradients(copy.deepcopy(network).double(), x.double())
    scales = {name: gradient.abs().max().item() for name, gradient in exact.items()}
    errors = {name: error64(plain[name], exact[name]) / scales[name] for name in exact}
    bound = 2 * max(errors.values()) + 1e-6
    for name, gradient in ours.items():
        assert error64(gradient, exact[name]) / scales[name] <= bound, name


def test_what_runs_where():
    network, wav = tiny_sat(1).encoder, noise(1, 1, 24000)
    assert convolutions(lambda: gradients(network, wav)) == {"aar_native::seanet_backward"}
    with use_backend("reference"):
        assert convolutions(lambda: gradients(network, wav)) == {"aten::convolution"}
    with torch.autocast("cpu", torch.bfloat16):
        assert convolutions(lambda: gradients(network, wav)) == {"aten::convolution"}
    exact = copy.deepcopy(network).double()
    assert convolutions(lambda: gradients(exact, wav.double())) == {"aten::convolution"}


def test_frozen_weights():
    """Gradients pass through a network that is not trained."""
    network, wav = tiny_sat(1).encoder.requires_grad_(False), noise(1, 1, 24000).requires_grad_()
    network(wav).sum().backward()
    with use_backend("reference"):
        (plain,) = torch.autograd.grad(network(wav).sum(), wav)
    torch.testing.assert_close(wav.grad, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
