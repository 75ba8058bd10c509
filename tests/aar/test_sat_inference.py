"""SAT's autoencoder at inference on the packed kernels: as accurate as its modules, and never stale."""

import copy

import pytest
import torch
from helpers import assert_as_accurate, require
from small import AUTOENCODERS, noise, tiny_sat

from aar.models import inference
from aar_kernels import use_backend


@pytest.fixture(autouse=True)
def native():
    return require("seanet_stack", "native")


def latents_of(model, wav):
    return inference.run(model.encoder, wav)


def operators(function) -> set[str]:
    with torch.profiler.profile() as profile:
        function()
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("config", AUTOENCODERS)
@torch.no_grad()
def test_as_accurate_as_the_modules(config):
    model = tiny_sat(1, config)
    exact = copy.deepcopy(model).double()
    wav = noise(3, 1, config.window_samples)
    latents = latents_of(model, wav)
    assert_as_accurate(latents, model.encoder(wav), exact.encoder(wav.double()))
    wave = inference.run(model.decoder, latents)
    assert_as_accurate(wave, model.decoder(latents), exact.decoder(latents.double()))


def test_encode_and_decode_run_on_the_kernels(model):
    """On all of it: no convolution of PyTorch's is left."""
    codes = model.encode(noise(1, 1, 24000))
    for names in (operators(lambda: model.encode(noise(1, 1, 24000))), operators(lambda: model.decode(codes))):
        assert {"aar_native::seanet_stack", "aar_native::seanet_lstm"} <= names
        assert not {"aten::convolution", "aten::lstm"} & names


def test_what_the_kernels_do_not_run_runs_as_before(model):
    wav = noise(1, 1, 24000)
    with torch.no_grad():
        plain = operators(lambda: model.forward(wav))
    assert "aten::convolution" in plain
    assert "aar_native::seanet_stack" not in plain
    with use_backend("reference"):
        assert "aten::convolution" in operators(lambda: model.encode(wav))
    exact = copy.deepcopy(model).double()
    assert "aten::convolution" in operators(lambda: exact.encode(wav))


def test_codes_are_those_of_the_plain_encoder():
    """These windows have no tie within rounding, so that float64, plain float32 and the kernels all agree."""
    model = tiny_sat(2, AUTOENCODERS[0])
    wav = noise(4, 1, 24000)
    codes = model.encode(wav)
    with use_backend("reference"):
        assert torch.equal(codes, model.encode(wav))
    assert torch.equal(codes, copy.deepcopy(model).double().encode(wav))
    assert codes.float().std() > 1


def stepped(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.encoder(noise(1, 1, 24000)).square().mean().backward()
    optimizer.step()


def loaded(model):
    model.load_state_dict(tiny_sat(7).state_dict())


def replaced(model):
    model.encoder.model[0].conv.conv.bias.data = torch.ones(2)


def converted(model):
    model.double()
    with torch.no_grad():
        model.encoder.model[0].conv.conv.bias.add_(1)
    model.float()


def folded(model):
    with torch.no_grad():
        model.encoder.model[0].conv.conv.bias.add_(1)
    model.fold_weight_norm()


@pytest.mark.parametrize("change", [stepped, loaded, replaced, converted, folded])
def test_changed_weights_are_never_served_stale(change):
    model, wav = tiny_sat(3), noise(2, 1, 24000)
    before = latents_of(model, wav)
    assert torch.equal(latents_of(model, wav), before)
    change(model)
    after = latents_of(model, wav)
    assert not torch.equal(after, before)
    with torch.no_grad():
        torch.testing.assert_close(after, model.encoder(wav), rtol=1e-4, atol=1e-5)


def test_weights_are_packed_once():
    model, wav = tiny_sat(4), noise(1, 1, 24000)
    latents_of(model, wav)
    entries = len(inference._packed)
    latents_of(model, wav)
    assert len(inference._packed) == entries
    assert torch.equal(latents_of(copy.deepcopy(model), wav), latents_of(model, wav))
    del model
    assert len(inference._packed) == entries - 1
