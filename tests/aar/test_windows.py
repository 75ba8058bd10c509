import pytest
import torch
from small import noise

from aar.models.windows import Windows


@pytest.mark.parametrize("overlap", [0, 1, 7, 50])
@pytest.mark.parametrize("num_samples", [1, 49, 50, 99, 100, 101, 150, 151, 199, 200, 201, 1000])
def test_split_then_join_gives_the_wave_back(overlap, num_samples):
    windows = Windows(100, overlap)
    wav = noise(2, num_samples)
    pieces = windows.split(wav)
    count = windows.count(num_samples)
    assert pieces.shape == (2, count, 100)
    assert count == 1 or windows.span(count - 1) < num_samples <= windows.span(count)
    joined = torch.zeros(2, windows.span(count))
    for index in range(count):
        windows.add(joined, pieces[:, index], index)
    torch.testing.assert_close(joined[:, :num_samples], wav, rtol=0, atol=2 * torch.finfo(wav.dtype).eps)
    assert not joined[:, num_samples:].any()


@pytest.mark.parametrize("overlap", [0, 1, 7, 50])
def test_gains_sum_to_one(overlap):
    windows = Windows(100, overlap)
    total = torch.zeros(windows.span(5), dtype=torch.float64)
    for index in range(5):
        windows.add(total, torch.ones(100, dtype=torch.float64), index)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)


def test_the_fade_is_gradual():
    windows = Windows(100, 50)
    faded = torch.zeros(windows.span(2))
    windows.add(faded, torch.ones(100), 0)
    steps = faded[50:100].diff()
    torch.testing.assert_close(steps, torch.full_like(steps, -1 / 50))
    torch.testing.assert_close(faded[50:100] + faded[50:100].flip(0), torch.ones(50))
    assert faded[:50].eq(1).all()
    assert faded[100:].eq(0).all()


@pytest.mark.parametrize("overlap", [-1, 51])
def test_impossible_overlaps(overlap):
    with pytest.raises(ValueError, match="half a window"):
        Windows(100, overlap)
