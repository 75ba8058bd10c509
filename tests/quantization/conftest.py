import pytest
import torch


@pytest.fixture(autouse=True)
def fill_empty():
    """Uninitialised memory is NaN (the largest number where integer), so that an output nobody wrote shows.

    PyTorch does that in `aten::empty`, which every allocation of the native operators also goes through; it
    comes with deterministic algorithms, so that those are on in all of these tests.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
