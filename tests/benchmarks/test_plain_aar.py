"""Plain PyTorch, which ours is timed against, is the same function as ours."""

import copy

import pytest
import torch
from benchmark_cases import codes_of, conditions, tiny_aar
from helpers import assert_as_accurate

from aar.baselines.plain_aar import PlainAAR, sample


@pytest.mark.parametrize("cosine", [True, False])
def test_logits_equal_ours(cosine):
    model = tiny_aar(cosine_attention=cosine)
    condition, codes = conditions(), codes_of(model)
    inputs = model.quantizer.next_scale_inputs(codes, backend="reference")
    double = copy.deepcopy(model).double()
    exact = PlainAAR(double).forward(condition.double(), inputs.double())
    torch.testing.assert_close(double(condition.double(), inputs.double()), exact, atol=1e-12, rtol=1e-12)
    assert_as_accurate(model(condition, inputs), PlainAAR(model).forward(condition, inputs), exact)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("cfg", [0.0, 4.0])
def test_greedy_codes_equal_ours(cosine, cfg):
    model = tiny_aar(cosine_attention=cosine)
    plain = PlainAAR(model).generate(conditions(), cfg=cfg, temperature=0)
    assert torch.equal(plain, model.sample(conditions(), cfg=cfg, temperature=0))


def test_guidance_matters_to_greedy_codes():
    """Else the test above could not see it."""
    generate = PlainAAR(tiny_aar()).generate
    codes = [generate(conditions(), cfg=cfg, temperature=0) for cfg in (0.0, 4.0)]
    assert torch.equal(codes[0][:, 0], codes[1][:, 0])  # the first scale has none
    assert not torch.equal(*codes)


def test_sampling_keeps_what_top_k_and_top_p_keep():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = probabilities.log().expand(1, 4000, 5)

    def shares(**options):
        options = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} | options
        codes = sample(logits, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(codes.flatten(), minlength=5) / codes.numel()

    # 5 standard deviations of a share of 4000 are at most 0.04
    torch.testing.assert_close(shares(), probabilities, atol=0.04, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0, 0]), atol=0.04, rtol=0)
    torch.testing.assert_close(shares(top_p=0.8), torch.tensor([4 / 9, 3 / 9, 2 / 9, 0, 0]), atol=0.04, rtol=0)
    assert shares(temperature=0)[0] == 1
