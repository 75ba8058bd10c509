"""The next-token baselines: token by token they are one causal pass."""

import pytest
import torch
from benchmark_cases import conditions, tiny_aar

from aar.baselines.next_token import Fused, Plain
from benchmarks.agreement import check_next_token

WAYS = {
    "plain": (Plain, torch.float32),
    "fp32": (lambda model, length: Fused(model, length, torch.float32), torch.float32),
    "bf16": (lambda model, length: Fused(model, length, torch.bfloat16), torch.bfloat16),
    "int8": (lambda model, length: Fused(model, length, torch.int8), torch.int8),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("length", [7, 25])
def test_cached_logits_are_those_of_a_causal_pass(way, cosine, length):
    make, dtype = WAYS[way]
    assert check_next_token(make(tiny_aar(cosine_attention=cosine), length), conditions(), dtype, tokens=25) == ""


def test_a_forgotten_token_is_found():
    ours = Plain(tiny_aar(), 9)
    logits = ours.logits

    def forgets(position, codes):
        ours.values[1][:, :, 2] = 0
        return logits(position, codes)

    ours.logits = forgets
    assert "off by" in check_next_token(ours, conditions(), torch.float32)


@pytest.mark.parametrize("make", [Plain, Fused])
def test_generates_the_same_codes_from_a_seed(make):
    model = tiny_aar()
    codes = make(model, 9).generate(conditions(), seed=3)
    assert codes.shape == (3, 9)
    assert codes.min() >= 0
    assert codes.max() < model.config.codebook_size
    assert torch.equal(codes, make(model, 9).generate(conditions(), seed=3))
    assert not torch.equal(codes, make(model, 9).generate(conditions(), seed=4))
