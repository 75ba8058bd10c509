"""Every backend draws the reference's codes, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from sampling_cases import draw_call, hard_rows

from aar_kernels.sampling import sample
from aar_kernels.sampling.common import factors
from aar_kernels.sampling.reference import guided, kept_weights

SETTINGS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for temperature, top_k, top_p in itertools.product((0.0, 1e-300, 0.3, 1.0, 1e300), (0, 1, 5, 39), (1e-9, 0.5, 1.0))
]


def assert_equal_codes(backend: str, **call) -> None:
    codes = sample(**call, backend=backend)
    expected = sample(**call, backend="reference")
    assert codes.dtype == torch.int64
    assert torch.equal(codes, expected), call


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(fast, seed):
    assert_equal_codes(fast, **draw_call(seed))


def test_hard_rows(fast):
    for settings in SETTINGS:
        assert_equal_codes(fast, logits=hard_rows(), seeds=torch.tensor([3]), **settings)


@pytest.mark.parametrize("vocabulary", [1, 65536])
def test_smallest_and_largest_vocabulary(fast, vocabulary):
    for seed in range(3):
        assert_equal_codes(fast, **draw_call(seed, vocabulary, rows=6))


def test_every_size_around_a_vector(fast):
    for vocabulary in range(1, 140):
        assert_equal_codes(fast, **draw_call(vocabulary, vocabulary, rows=3))


def assert_equal_weights(backend: str, gaps: list[float], draws: int) -> None:
    """Every weight is the reference's to the last bit, and p is a double. Codes alone would seldom show that: so take
    two codes, and p half a unit of weight below or above the first one's share, which keeps the second one or not."""
    conditional, unconditional, scale = factors(1.5, 0.9)
    for gap in gaps:
        logits = torch.tensor([0.3, 0.3 - gap])
        uncond = logits * 0.37 + 0.1
        first, second = kept_weights(guided(logits, uncond, conditional, unconditional), scale, 0, 1.0).tolist()
        assert 0 < second < first == 1 << 30
        pair = {name: row.expand(1, draws, 2) for name, row in (("logits", logits), ("uncond", uncond))}
        settings = {"guidance": 1.5, "temperature": 0.9, "seeds": torch.tensor([1]), "backend": backend}
        for more, both in ((-0.5, False), (0.5, True)):
            codes = sample(**pair, top_p=(first + more) / (first + second), **settings)
            assert codes.any().item() == both, (gap, more)


def test_weights_to_the_last_bit(backend):
    assert_equal_weights(backend, [0.003 + i / 40 for i in range(80)], draws=2000)


def test_results_do_not_depend_on_the_number_of_threads(fast):
    call = draw_call(5, vocabulary=257, rows=60) | {"temperature": 1.0}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(sample(**call, backend=fast))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(codes, results[0]) for codes in results)
