"""Reconstruction losses: against plain formulas, and what training relies on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aar.audio import mel
from aar.training import losses


def wave(batch: int = 2, samples: int = 6000, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def plain_filter_bank(n_fft: int, n_mels: int, rate: int) -> np.ndarray:
    """Slaney's filter bank, one bin at a time, as its definition reads."""

    def hz(m: float) -> float:
        return m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

    top = 15 + 27 * np.log(rate / 2000) / np.log(6.4)
    corners = [hz(top * i / (n_mels + 1)) for i in range(n_mels + 2)]
    bank = np.zeros((n_mels, n_fft // 2 + 1))
    for m in range(n_mels):
        low, middle, high = corners[m : m + 3]
        for k in range(n_fft // 2 + 1):
            f = k * rate / n_fft
            if low < f <= middle:
                bank[m, k] = (f - low) / (middle - low)
            elif middle < f < high:
                bank[m, k] = (high - f) / (high - middle)
        bank[m] *= 2 / (high - low)
    return bank


@pytest.mark.parametrize("n_fft", losses.WINDOWS)
@pytest.mark.parametrize("rate", [24_000, 44_100])
def test_filter_bank_is_slaneys(n_fft, rate):
    expected = plain_filter_bank(n_fft, 64, rate)
    np.testing.assert_allclose(mel.mel_filter_bank(n_fft, 64, rate).numpy(), expected, rtol=0, atol=1e-12)


def test_filters_have_unit_area_where_bins_are_dense():
    area = mel.mel_filter_bank(16_384, 64, 24_000).sum(1) * 24_000 / 16_384
    torch.testing.assert_close(area, torch.ones_like(area), rtol=0.01, atol=0.0)


def test_mel_scale_inverts():
    frequency = torch.linspace(0.0, 12_000.0, 1001, dtype=torch.float64)
    back = mel.mel_to_hz(mel.hz_to_mel(frequency))
    torch.testing.assert_close(back, frequency, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("window", losses.WINDOWS)
def test_spectrogram_against_a_float64_dft(window):
    hop, x = window // 4, wave(1, 4096).double()
    pad = (window - hop) // 2
    padded = np.pad(x.numpy()[0, 0], pad, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * hann
    power = np.abs(np.fft.rfft(frames)) ** 2
    expected = np.log10(np.maximum(plain_filter_bank(window, 64, 24_000) @ power.T, 1e-5))

    ours = mel.LogMelSpectrogram(window, hop).double()(x)
    assert ours.shape == (1, 1, 64, 4096 // hop)
    # Windows and filters were rounded to float32 before: 1e-7 of the loudest bin, seen in the quietest.
    np.testing.assert_allclose(ours[0, 0].numpy(), expected, rtol=0, atol=1e-5)


def reconstruction(estimate: torch.Tensor, target: torch.Tensor) -> losses.TokenizerTerms:
    return losses.TokenizerLoss()(estimate, target, torch.zeros(()))


def test_reconstruction_terms_and_weights():
    estimate, target = wave(seed=0), wave(seed=1)
    terms = reconstruction(estimate, target)
    torch.testing.assert_close(terms.wave, (estimate - target).abs().mean())
    torch.testing.assert_close(terms.mel, losses.MultiResolutionMelLoss()(estimate, target))
    torch.testing.assert_close(terms.total, terms.mel + 0.1 * terms.wave)


def test_identical_input_costs_nothing():
    assert reconstruction(wave(), wave()).total.item() == 0.0


@pytest.mark.parametrize("estimate", [wave(), torch.zeros(2, 1, 6000)], ids=["noise", "silence"])
def test_gradient_is_finite_and_descends(estimate):
    target = wave(seed=1)
    estimate = estimate.clone().requires_grad_()
    terms = reconstruction(estimate, target)
    (gradient,) = torch.autograd.grad(terms.total, estimate)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    step = 1e-3 * gradient / gradient.abs().max()
    assert reconstruction(estimate - step, target).total < terms.total


def test_nothing_is_rebuilt_per_call(monkeypatch):
    loss = losses.MultiResolutionMelLoss()
    before = {name: buffer.data_ptr() for name, buffer in loss.named_buffers()}
    monkeypatch.setattr(mel, "mel_filter_bank", None)
    monkeypatch.setattr(torch, "hann_window", None)
    loss(wave(), wave(seed=1))
    assert before == {name: buffer.data_ptr() for name, buffer in loss.named_buffers()}
    assert len(before) == 2 * len(losses.WINDOWS)
    assert not loss.state_dict()
