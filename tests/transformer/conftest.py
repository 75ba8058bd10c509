import pytest
from helpers import FAST, require


@pytest.fixture(autouse=True)
def _fill_empty(nan_filled_empty):
    pass


@pytest.fixture(params=[*FAST, "reference"])
def backend(request) -> str:
    return require("transformer_step", request.param)


@pytest.fixture(params=FAST)
def fast(request) -> str:
    """A backend that is held to the reference."""
    return require("transformer_step", request.param)
