"""The acoustic embedding: what it tells apart, and what not."""

from __future__ import annotations

import pytest
import torch
from small import noise

from aar.audio import read_audio
from aar.conditions import AcousticEmbedding
from aar.demo.recordings import CLIPS


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    return [read_audio(path) for path in sorted(CLIPS.glob("*.flac"))]


@pytest.fixture(scope="module")
def embedding() -> AcousticEmbedding:
    return AcousticEmbedding()


def test_fixed(embedding, clips):
    assert not list(embedding.parameters())
    assert not embedding.state_dict()
    ours = embedding.embed_audio(clips, 24000)
    assert ours.shape == (len(clips), AcousticEmbedding.dim) == (15, 192)
    assert torch.equal(ours, AcousticEmbedding().embed_audio(clips, 24000))
    assert torch.equal(ours[3], embedding.embed_audio([clips[3]], 24000)[0])


def test_batches_are_embedded_one_by_one(embedding):
    waves = noise(4, 24000)
    torch.testing.assert_close(embedding(waves), embedding.embed_audio(list(waves), 24000), rtol=0, atol=1e-4)
    assert embedding(waves.view(2, 2, 24000)).shape == (2, 2, 192)


def test_formula(embedding):
    wave = noise(24000)
    mel = embedding.spectrogram(wave)
    mean, std, change = embedding(wave).view(3, 64)
    torch.testing.assert_close(mean, (mel.mean(1) + 2.5) / 1.6)
    torch.testing.assert_close(std, (mel.std(1, unbiased=False) - 0.95) / 0.57)
    torch.testing.assert_close(change, ((mel[:, 1:] - mel[:, :-1]).abs().mean(1) - 0.22) / 0.13)


def test_about_normal_over_the_clips(embedding, clips):
    seconds = torch.cat([clip[: len(clip) // 24000 * 24000].view(-1, 24000) for clip in clips])
    for block in embedding(seconds).view(-1, 3, 64).unbind(1):
        assert abs(block.mean()) < 0.3
        assert 0.6 < block.std() < 1.5


def test_clips_are_told_apart(embedding, clips):
    """The halves of a clip are nearer to each other than to most halves of others."""
    halves = [embedding.embed_audio([clip[: len(clip) // 2], clip[len(clip) // 2 :]], 24000) for clip in clips]
    first, second = (torch.stack([half[i] for half in halves]) for i in range(2))
    rank = torch.cdist(first, second).argsort(dim=1).argsort(dim=1).diagonal()
    assert (rank == 0).float().mean() >= 0.6  # by chance 1/15


def test_invariances(embedding, clips):
    def distance(a, b):
        return (embedding(a) - embedding(b)).abs().mean().item()

    clip = clips[0]
    other = distance(clip, clips[1][: len(clip)])
    assert distance(clip, clip.flip(0)) < 0.1 * other
    assert distance(clip, -clip) == 0
    assert distance(clip[:48000], clip[256:48256]) < 0.1 * other
    assert distance(clip, 0.1 * clip) > 0.2 * other


def test_other_rates(embedding):
    import soxr

    wave = noise(24000).cumsum(0) / 10
    double = torch.from_numpy(soxr.resample(wave.numpy(), 24000, 48000))
    resampled, plain = embedding.embed_audio([double], 48000), embedding.embed_audio([wave], 24000)
    assert (resampled - plain)[:, :60].abs().max() < 0.05  # the highest bands lie where resampling fades out


@pytest.mark.parametrize("samples", [1, 100, 1024])
def test_short_waves(embedding, samples):
    assert embedding(noise(samples)).isfinite().all()
