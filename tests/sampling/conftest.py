import pytest
from helpers import FAST, require

import aar_kernels.sampling  # noqa: F401 (declares the operator to dispatch)


@pytest.fixture(autouse=True)
def _fill_empty(nan_filled_empty):
    pass


@pytest.fixture(params=[*FAST, "reference"])
def backend(request) -> str:
    return require("sampling_sample", request.param)


@pytest.fixture(params=FAST)
def fast(request) -> str:
    """A backend that must draw the reference's codes."""
    return require("sampling_sample", request.param)
