"""Sounds from formulas: whole, within range, each its own, and the same again from the same seed."""

import numpy as np
import pytest
import soundfile

from aar import cli
from aar.data import find_audio, synthesis

MAKERS = (*synthesis.MUSIC, *synthesis.TEXTURES)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_sounds(maker):
    first, again, other = (synthesis.render(maker, seed) for seed in (0, 0, 1))
    assert first.shape == (5 * synthesis.SAMPLE_RATE,)
    assert 0.1 < np.abs(first).max() < 1.0
    assert np.sqrt(np.mean(first**2)) > 1e-3
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.corrcoef(first, other)[0, 1]) < 0.5


def test_makers_of_one_seed_differ():
    """In their random numbers too: the same hiss below every sound would be learned."""
    hisses = [np.random.default_rng([0, *maker.__name__.encode()]).random() for maker in MAKERS]
    assert len(set(hisses)) == len(MAKERS)


def test_command(tmp_path, capsys):
    assert cli.main(["data", "synthesize", str(tmp_path), "--each", "1", "--seed", "3"]) == 0
    assert f"{len(MAKERS)} sounds" in capsys.readouterr().out
    found = find_audio(tmp_path)
    assert {recording.label for recording in found} == {"music", "textures"}
    assert len(found) == len(MAKERS)
    samples, rate = soundfile.read(tmp_path / "textures/synthesis/wind/000.flac")
    assert rate == synthesis.SAMPLE_RATE
    np.testing.assert_allclose(samples, synthesis.render(synthesis.wind, 3), rtol=0, atol=2**-14)


@pytest.mark.parametrize("options", [("--each", "0"), ("--seed", "-1")])
def test_impossible_numbers(tmp_path, capsys, options):
    assert cli.main(["data", "synthesize", str(tmp_path), *options]) == 2
    assert options[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
