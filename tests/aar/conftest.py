import numpy as np
import pytest
from small import tiny_sat

from aar import SAT


@pytest.fixture(scope="session")
def model() -> SAT:
    """Shared by tests that leave it as it is."""
    return tiny_sat()


@pytest.fixture(scope="session")
def model_dir(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def recording(tmp_path):
    """Writes seconds of a chord into tmp_path; returns the path."""
    soundfile = pytest.importorskip("soundfile")  # machines with GPUs often have no more than torch

    def write(name: str = "in.wav", seconds: float = 0.4, rate: int = 24000, channels: int = 1, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        t = np.arange(round(seconds * rate)) / rate
        wave = sum(0.2 * np.sin(2 * np.pi * f * t) for f in (220, 277, 330))
        soundfile.write(
            path, np.stack([wave * (c + 1) / channels for c in range(channels)], axis=1), rate, **options
        )
        return path

    return write
