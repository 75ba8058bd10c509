import pytest
import torch

from benchmarks import codec, generation, training


@pytest.fixture(autouse=True)
def _fill_empty(nan_filled_empty):
    pass


@pytest.fixture
def quick(monkeypatch):
    """Benchmarks that measure no peaks, and leave the number of threads as it was."""
    threads = torch.get_num_threads()
    for module in (codec, generation, training):
        monkeypatch.setattr(module, "peaks", lambda *_: {"peak_gflops": 50.0, "read_gbs": 10.0})
    torch.set_num_threads(1)  # two wait for each other where other processes run
    yield
    torch.set_num_threads(threads)
