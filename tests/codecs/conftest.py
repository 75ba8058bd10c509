import pytest
from helpers import require


@pytest.fixture(autouse=True)
def _fill_empty(nan_filled_empty):
    pass


@pytest.fixture
def native() -> str:
    return require("msrq_encode", "native")
