"""What is drawn against the definition in float64, by sorting: the sets that the filters keep, and the frequencies."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import exact_probabilities, hard_rows

from aar_kernels.sampling import sample
from aar_kernels.sampling.common import factors
from aar_kernels.sampling.reference import guided, kept_weights

DRAWS = 100_000
P_VALUE = 1e-3  # of the chi-square tests: seeds are fixed, so that a passing test passes always


def bound(vocabulary: int) -> float:
    """Total variation between the integer weights and the exact probabilities, as `sample` states it."""
    return vocabulary * 2.0**-30 + 4e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (200, 1.0), (0, 0.95), (200, 0.95), (7, 0.3), (1, 0.5)])
def test_the_filters_keep_the_sets_that_sorting_keeps(temperature, top_k, top_p):
    """And the weights have the stated accuracy. Rows whose p is nearer to a sum than rounding are few."""
    torch.manual_seed(0)
    logits, uncond = torch.randn(2, 50, 10, 1024) * 2
    conditional, unconditional, scale = factors(2.0, temperature)
    x = guided(logits, uncond, conditional, unconditional)
    weights = kept_weights(x, scale, top_k, top_p)
    exact, margin = exact_probabilities(x, temperature, top_k, top_p)
    decided = margin > bound(1024)
    assert decided.float().mean() > 0.95
    # A code of weight 0 is kept by the filters, but never drawn.
    visible = exact > 2.0**-29 * exact.amax(-1, keepdim=True)
    assert torch.equal((weights > 0)[decided] & visible[decided], visible[decided])
    assert not (weights > 0)[decided][exact[decided] == 0].any()
    error = (weights / weights.sum(-1, keepdim=True) - exact).abs().sum(-1) / 2
    assert error[decided].max() <= bound(1024)


def test_guidance():
    """The definition is (1 + g) * logits - g * uncond, in fp32."""
    torch.manual_seed(0)
    logits, uncond = torch.randn(2, 4, 5, 64)
    exact = 3.5 * logits.double() - 2.5 * uncond.double()
    x = guided(logits, uncond, *factors(2.5, 1.0)[:2])
    assert (x - exact).abs().max() <= 2 * torch.finfo(torch.float32).eps * 3.5 * 2 * logits.abs().max()
    greedy = sample(logits, uncond=uncond, guidance=2.5, temperature=0.0, seeds=torch.arange(4))
    assert torch.equal(greedy, exact.argmax(-1))


def test_ties(backend):
    """Equal logits at the k-th place and at p are all kept; the first of the largest is the greedy choice."""
    run = lambda row, draws=4000, **settings: sample(  # noqa: E731
        torch.tensor(row).expand(1, draws, len(row)), seeds=torch.tensor([0]), backend=backend, **settings
    ).unique()
    row = [1.0, 2.0, 1.0, 0.0, 2.0, 1.0]
    assert run(row, top_k=1).tolist() == [1, 4]
    assert run(row, top_k=3).tolist() == [0, 1, 2, 4, 5]
    assert run(row, top_p=0.1).tolist() == [1, 4]
    assert run(row, top_p=0.75).tolist() == [0, 1, 2, 4, 5]
    assert run(row, top_k=2, top_p=0.99).tolist() == [1, 4]
    assert run(row, temperature=0.0).tolist() == [1]
    assert run([-0.0, 0.0, -1.0], top_k=1).tolist() == [0, 1]
    assert run([5.0, 0.0, -3.0], top_p=1e-12).tolist() == [0]
    assert run([-float("inf"), 0.0, -float("inf"), 1.0], temperature=1e6).tolist() == [1, 3]


def test_masked_codes_and_huge_ranges(backend):
    """A code at -inf, or at a weight of 0, never comes; one finite code always does."""
    rows = hard_rows()
    for temperature in (1.0, 1e300):
        every = {"logits": rows.expand(50, -1, -1), "seeds": torch.arange(50)}
        codes = sample(**every, temperature=temperature, backend=backend)
        drawn = rows[0].expand(50, -1, -1).gather(2, codes[..., None])
        assert drawn.isfinite().all()
        assert (codes[:, 1] == rows.shape[2] // 3).all()
    cold = sample(rows, temperature=1e-300, seeds=torch.tensor([0]), backend=backend)
    # The least temperature is 1 / 2e38 in effect: colder than any difference but that of two denormals.
    assert (rows[0].amax(-1) - rows[0].gather(1, cold[0, :, None])[:, 0] < 1e-37).all()


def survival(codes, probabilities, draws: int) -> float:
    """The probability of a chi-square statistic at least this large. Codes of probability 0 must not come."""
    counts = codes.flatten().bincount(minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = draws * probabilities[possible]
    assert expected.min() >= 5  # where the distribution of the statistic is that of chi-square
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((possible.sum().item() - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.fixture(scope="module")
def row():
    """Guided logits whose rarest code still comes a few times."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 32, generator=generator)


FILTERS = [(0, 1.0), (10, 1.0), (0, 0.8), (10, 0.8)]


@pytest.mark.parametrize("streams", [1, DRAWS])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_frequencies(backend, row, top_k, top_p, streams):
    """Over the tokens of one item, and over the items of neighbouring seeds."""
    logits, uncond = row[:, None, None].expand(-1, streams, DRAWS // streams, -1)
    settings = {"guidance": 0.5, "temperature": 1.2, "top_k": top_k, "top_p": top_p}
    codes = sample(logits, uncond=uncond, seeds=torch.arange(streams), backend=backend, **settings)
    exact, margin = exact_probabilities(1.5 * row[0] - 0.5 * row[1], 1.2, top_k, top_p)
    assert margin > 1e-3
    assert survival(codes, exact, DRAWS) > P_VALUE
    other, _ = exact_probabilities(1.5 * row[0] - 0.5 * row[1], 1.25, top_k, top_p)
    assert survival(codes, other, DRAWS) < P_VALUE  # the test tells temperatures 4 % apart


def test_neighbouring_draws_are_independent(backend):
    """Pairs of neighbouring tokens, and of tokens of neighbouring seeds, over 8 equal codes: 64 equal pairs."""
    codes = sample(torch.zeros(100, 1000, 8), seeds=torch.arange(100), backend=backend)
    uniform = torch.full((64,), 1 / 64, dtype=torch.float64)
    along_tokens = codes[:, ::2] * 8 + codes[:, 1::2]
    along_seeds = codes[::2] * 8 + codes[1::2]
    for pairs in (along_tokens, along_seeds):
        assert survival(pairs, uniform, pairs.numel()) > P_VALUE
