"""The discriminator and the losses that it gives: shapes, values by hand, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import noise

from aar.training import losses
from aar.training.discriminator import WINDOWS, Judgement, MultiScaleSTFTDiscriminator, STFTDiscriminator


@pytest.fixture(scope="module")
def discriminator():
    torch.manual_seed(0)
    return MultiScaleSTFTDiscriminator(filters=4)


def test_shapes(discriminator):
    wave = noise(2, 1, 6000)
    for window, judged in zip(WINDOWS, discriminator(wave), strict=True):
        frames, bins = 1 + 6000 // (window // 4), window // 2 + 1
        widths = [bins]
        for _ in range(3):
            widths.append((widths[-1] + 1) // 2)
        assert [tuple(f.shape) for f in judged.features] == [(2, 4, frames, b) for b in (*widths, widths[-1])]
        assert judged.logits.shape == (2, 1, frames, widths[-1])


def test_published_size():
    # Five copies of 2x32x27, three of 32x32x27, 32x32x9 and 32x1x9 weights, each layer with a bias and weight norm's
    # factor per output.
    weights = 2 * 32 * 27 + 3 * 32 * 32 * 27 + 32 * 32 * 9 + 32 * 9
    outputs = 5 * 32 + 1
    parameters = sum(p.numel() for p in MultiScaleSTFTDiscriminator().parameters())
    assert parameters == 5 * (weights + 2 * outputs)


@pytest.mark.parametrize("window", WINDOWS)
def test_white_noise_comes_in_at_unit_loudness(window):
    part, seen = STFTDiscriminator(window, filters=1), []
    part.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    part(torch.randn(4, 1, 12000, generator=torch.Generator().manual_seed(0)))
    assert seen[0].shape[1] == 2
    assert seen[0].square().sum(1).mean().item() == pytest.approx(1.0, rel=0.05)


def test_spectrogram_is_a_dft_with_time_before_frequency():
    part, seen = STFTDiscriminator(128, filters=1), []
    part.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    wave = noise(1, 1, 1000)
    part(wave)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(128) / 128)
    frame = wave[0, 0, 10 * 32 - 64 : 10 * 32 + 64].numpy() * hann / np.linalg.norm(hann)
    expected = np.fft.rfft(frame)
    np.testing.assert_allclose(seen[0][0, 0, 10].numpy(), expected.real, rtol=0, atol=1e-5)
    np.testing.assert_allclose(seen[0][0, 1, 10].numpy(), expected.imag, rtol=0, atol=1e-5)


def test_layers_dilate_time_and_halve_bins(discriminator):
    for part in discriminator.discriminators:
        convs = [*part.layers, part.head]
        assert [c.dilation for c in convs] == [(1, 1), (1, 1), (2, 1), (4, 1), (1, 1), (1, 1)]
        assert [c.stride for c in convs] == [(1, 1), (1, 2), (1, 2), (1, 2), (1, 1), (1, 1)]
        assert all(torch.nn.utils.parametrize.is_parametrized(c, "weight") for c in convs)


def test_gradients_reach_the_wave_and_every_weight(discriminator):
    real, fake = noise(2, 1, 4096, seed=2), noise(2, 1, 4096, seed=3).requires_grad_()
    judged, target = discriminator(fake), discriminator(real)
    for loss in (losses.generator_hinge_loss(judged), losses.feature_matching_loss(target, judged)):
        (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient != 0).float().mean() > 0.99
    # Of the recordings alone: as long as all logits are within 1, the other half of the loss pulls biases back as much.
    silent = [Judgement(torch.full((1,), -2.0), []) for _ in WINDOWS]
    loss = losses.discriminator_hinge_loss(target, silent)
    gradients = torch.autograd.grad(loss, list(discriminator.parameters()))
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_it_learns_to_tell_noise_from_tones():
    torch.manual_seed(1)
    model = MultiScaleSTFTDiscriminator(windows=(256, 128), filters=4)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    t = torch.arange(2048) / 24000
    tones = torch.stack([0.3 * torch.sin(2 * torch.pi * f * t) for f in (300.0, 900.0, 2000.0)]).unsqueeze(1)
    for step in range(40):
        real, fake = model(tones), model(noise(3, 1, 2048, seed=step))
        loss = losses.discriminator_hinge_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # from 2


def test_wave_too_short_or_of_another_shape(discriminator):
    for shape in [(1, 1, 1024), (1, 2, 6000), (6000,)]:
        with pytest.raises(ValueError, match=r"wave must be \[B, 1, N\] with N at least 1025"):
            discriminator(noise(*shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(discriminator, dtype):
    wave = noise(1, 1, 4096)
    with torch.autocast("cpu", dtype):
        judged = discriminator(wave.to(dtype))
        assert judged[0].logits.dtype == dtype
        terms = losses.TokenizerLoss()(wave.to(dtype), wave, torch.tensor(0.0), judged, judged)
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms)
    exact = losses.MultiResolutionMelLoss()(wave.to(dtype).float(), wave)
    torch.testing.assert_close(terms.mel, exact, rtol=1e-5, atol=0)


def judgement(logits, *features) -> Judgement:
    return Judgement(torch.tensor(logits), [torch.tensor(f) for f in features])


REAL = [judgement([2.0, 0.5], [1.0, -3.0], [0.0, 4.0]), judgement([-1.0], [2.0, 2.0], [1.0, 1.0])]
FAKE = [judgement([-2.0, 0.0], [2.0, -1.0], [0.0, 0.0]), judgement([3.0], [2.0, 1.0], [1.0, 1.0])]


def test_hinge_values():
    # Real: (0 + 0.5) / 2 and 2; fake: (0 + 1) / 2 and 4. The mean over two resolutions, taken once.
    assert losses.discriminator_hinge_loss(REAL, FAKE).item() == (0.25 + 0.5 + 2 + 4) / 2
    assert losses.generator_hinge_loss(FAKE).item() == ((3 + 1) / 2 + 0) / 2


def test_feature_matching_values():
    # Mean |d| / mean |real|: 1.5 / 2, 2 / 2, 0.5 / 2, 0; the mean over four maps.
    assert losses.feature_matching_loss(REAL, FAKE).item() == (0.75 + 1 + 0.25 + 0) / 4
    silent = [judgement([0.0], [0.0, 0.0])]
    assert losses.feature_matching_loss(silent, silent).item() == 0


def test_more_resolutions_cost_no_more():
    assert losses.discriminator_hinge_loss(REAL * 3, FAKE * 3) == losses.discriminator_hinge_loss(REAL, FAKE)
    assert losses.generator_hinge_loss(FAKE * 3) == losses.generator_hinge_loss(FAKE)
    assert losses.feature_matching_loss(REAL * 3, FAKE * 3) == losses.feature_matching_loss(REAL, FAKE)


def test_features_of_recordings_are_constants():
    real = [Judgement(torch.zeros(1), [torch.ones(3, requires_grad=True)])]
    fake = [Judgement(torch.zeros(1), [torch.zeros(3, requires_grad=True)])]
    losses.feature_matching_loss(real, fake).backward()
    assert real[0].features[0].grad is None
    assert fake[0].features[0].grad is not None


def test_weights():
    assert losses.LossWeights() == losses.LossWeights(3.0, 3.0, 0.1, 1.0, 1.0)
    weights = losses.LossWeights(adversarial=2.0, feature_matching=5.0, wave=7.0, mel=11.0, commitment=13.0)
    estimate, target, commitment = noise(1, 1, 4096, seed=0), noise(1, 1, 4096, seed=1), torch.tensor(0.5)
    terms = losses.TokenizerLoss(weights=weights)(estimate, target, commitment, REAL, FAKE)
    torch.testing.assert_close(terms.wave, (estimate - target).abs().mean())
    torch.testing.assert_close(terms.mel, losses.MultiResolutionMelLoss()(estimate, target))
    assert (terms.commitment.item(), terms.adversarial.item(), terms.feature_matching.item()) == (0.5, 1.0, 0.5)
    torch.testing.assert_close(terms.total, 7 * terms.wave + 11 * terms.mel + 13 * 0.5 + 2 * 1.0 + 5 * 0.5)
    with pytest.raises(ValueError, match="weight mel must not be negative"):
        losses.LossWeights(mel=-1.0)


def test_before_the_adversarial_phase():
    wave = noise(1, 1, 4096)
    terms = losses.TokenizerLoss()(wave, wave, torch.tensor(0.25))
    assert [term.item() for term in terms] == [0.25, 0, 0, 0.25, 0, 0]
