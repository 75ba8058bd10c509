"""The next-token baselines: token by token they are one causal pass."""

import pytest
import torch
from benchmark_cases import TINY, conditions, tiny_aar
from graph_recording import Launches, Recording, record_graphs

from aar.baselines.next_token import Fused, Graphed, Plain
from aar.models import generation
from benchmarks.agreement import check_next_token

WAYS = {
    "plain": (Plain, torch.float32),
    "graphed": (Graphed, torch.float32),
    "fp32": (lambda model, length: Fused(model, length, torch.float32), torch.float32),
    "bf16": (lambda model, length: Fused(model, length, torch.bfloat16), torch.bfloat16),
    "int8": (lambda model, length: Fused(model, length, torch.int8), torch.int8),
    "fp8": (lambda model, length: Fused(model, length, torch.float8_e4m3fn), torch.float8_e4m3fn),
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


@pytest.mark.parametrize("make", [Plain, Graphed, Fused])
def test_generates_the_same_codes_from_a_seed(make):
    model = tiny_aar()
    codes = make(model, 9).generate(conditions(), seed=3)
    assert codes.shape == (3, 9)
    assert codes.min() >= 0
    assert codes.max() < model.config.codebook_size
    assert torch.equal(codes, make(model, 9).generate(conditions(), seed=3))
    assert not torch.equal(codes, make(model, 9).generate(conditions(), seed=4))


def test_the_position_as_a_tensor_changes_nothing():
    """Nor what a sequence left in the caches before."""
    model, graphed = tiny_aar(), Graphed(tiny_aar(), 9)
    for seed in (3, 4):
        assert torch.equal(graphed.generate(conditions(), seed=seed), Plain(model, 9).generate(conditions(), seed=seed))


def test_one_graph_serves_all_tokens_and_sequences(monkeypatch):
    record_graphs(monkeypatch)
    monkeypatch.setattr(Graphed, "_captures", lambda _: True)
    model, graphed = tiny_aar(), Graphed(tiny_aar(), 9)
    for seed in (3, 4):
        condition = conditions() * seed
        assert torch.equal(graphed.generate(condition, seed=seed), Plain(model, 9).generate(condition, seed=seed))
    assert Recording.made == 1
    graphed.generate(conditions(), cfg=1.0)
    graphed.generate(conditions()[:1])
    assert Recording.made == 3


def test_narrow_activations(monkeypatch):
    """As on CUDA: held to what autocast makes of the same weights."""
    monkeypatch.setattr(generation, "_is_packed", lambda *_: False)
    assert check_next_token(Fused(tiny_aar(), 9, torch.bfloat16), conditions(), torch.bfloat16) == ""
    narrow = tiny_aar().to(torch.bfloat16)
    assert check_next_token(Graphed(narrow, 9), conditions().bfloat16(), torch.bfloat16) == ""


@torch.no_grad()
def test_a_graphed_token_never_waits_for_the_device(monkeypatch):
    """Traced on meta tensors, which have no values."""
    monkeypatch.setattr(torch, "Generator", lambda _: torch.default_generator)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda noise, generator: noise)
    with torch.device("meta"):
        graphed = Graphed(tiny_aar(), 9)
        graphed.begin(torch.empty(3, TINY.condition_dim))
        inputs = graphed._on_device(4, None)
    with Launches() as launches:
        codes = Plain.step(graphed, *inputs, cfg=4.0)
    assert codes.shape == (3,)
    assert "topk" in launches.names
