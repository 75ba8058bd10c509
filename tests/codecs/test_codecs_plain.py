"""Plain residual quantizers of other packages give the same results when they are accelerated."""

from __future__ import annotations

import random

import pytest
import torch
from codec_cases import PLAIN, assert_same_codes, make_plain, originals, signature, unit_codes

import aar_kernels as ak


def pair(name: str, seed: int = 0):
    """The case, and a copy of its module as the package wrote it."""
    case = make_plain(name, random.Random(f"{name} {seed}"))
    original = originals(case.module)
    report = ak.accelerate(case.module)
    assert len(report.replaced) == 1, report
    return case, original


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_codes_and_decoding(name, seed):
    """Over random shapes and numbers of levels; an item's codes do not depend on its neighbours."""
    case, original = pair(name, seed)
    rng = random.Random(seed)
    batch, length = rng.randint(1, 8), rng.choice((1, 2, 7, 31, 100))
    x = torch.randn(batch, case.channels, length, generator=torch.Generator().manual_seed(seed))
    for count in {1, rng.randint(1, case.levels), case.levels}:
        codes = case.encode(case.module, x, count)
        assert codes.shape[1] == count
        assert_same_codes(codes, case.encode(original, x, count), case, original, x)
        alone = [case.encode(case.module, item[None], count) for item in x]
        assert torch.equal(torch.cat(alone), codes)
        fewer = not name.startswith("ResidualVQ")  # which decodes fewer only where it was built with dropout
        if fewer or count == case.levels:
            torch.testing.assert_close(case.decode(case.module, codes), case.decode(original, codes))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_a_long_input(name):
    case, original = pair(name)
    x = torch.randn(1, case.channels, 6000, generator=torch.Generator().manual_seed(0))
    codes = case.encode(case.module, x, case.levels)
    assert_same_codes(codes, case.encode(original, x, case.levels), case, original, x)
    part = case.encode(case.module, x[..., 100:130], case.levels)
    assert torch.equal(part, codes[..., 100:130])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_the_fused_operators_run(name, monkeypatch):
    """Nothing above would notice if the original ran each time."""
    case, _ = pair(name)

    def fail(*_):
        raise AssertionError("the original runs")

    for method in ("encode", "decode", "forward", "get_output_from_indices"):
        if method in vars(type(case.module)._aar_original):
            monkeypatch.setattr(type(case.module)._aar_original, method, fail)
    codes = case.encode(case.module, torch.randn(2, case.channels, 5), case.levels)
    case.decode(case.module, codes)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_values_that_no_codebook_knows(name):
    """NaN, Inf, codes outside the codebook and empty inputs have the original's answer."""
    case, original = pair(name)
    x = torch.randn(2, case.channels, 9, generator=torch.Generator().manual_seed(0))
    x[0, 0, 3], x[1, 1, 4] = float("nan"), float("inf")
    assert torch.equal(case.encode(case.module, x, 2), case.encode(original, x, 2))
    codes = case.encode(original, x.nan_to_num(0, 0, 0), case.levels)
    for wrong in (-1, 10**6) if not name.startswith("ResidualVQ") else (10**6,):
        codes[0, 0, 0] = wrong
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            case.decode(original, codes)
        with pytest.raises(type(theirs.value)):
            case.decode(case.module, codes)


@pytest.mark.parametrize("name", PLAIN)
def test_signatures(name):
    case, original = pair(name)
    for method in ("encode", "decode", "forward", "get_output_from_indices"):
        if hasattr(original, method):
            assert signature(getattr(case.module, method)) == signature(getattr(original, method))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes_are_the_originals(dtype):
    case, original = pair("transformers EnCodec")
    x = torch.randn(2, case.channels, 9, dtype=dtype)
    assert torch.equal(case.encode(case.module.to(dtype), x, 4), case.encode(original.to(dtype), x, 4))


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_autocast_is_the_originals():
    case, original = pair("transformers EnCodec")
    x = torch.randn(4, case.channels, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.encode(case.module, x, 8), case.encode(original, x, 8))


@pytest.mark.parametrize("kmeans", [False, True])
@pytest.mark.parametrize("name", ["encodec", "ResidualVQ"])
def test_training_is_the_originals(name, kmeans):
    """Forward, gradients, moving averages, dead codes and k-means; then evaluation with the new codebooks."""
    options = {"kmeans_init": True} if kmeans and name == "ResidualVQ" else {}
    rng = random.Random(3)
    case = PLAIN[name](rng, **options)
    if not kmeans:
        for buffer_name, buffer in case.module.named_buffers():
            if "embed" in buffer_name:
                buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0)))
            if "init" in buffer_name:
                buffer.fill_(1)
    original = originals(case.module)
    ak.accelerate(case.module)
    results = []
    for module in (case.module, original):
        torch.manual_seed(0)
        module.train()
        sequence = torch.randn(4, case.channels, 40)
        x = (sequence.mT if name == "ResidualVQ" else sequence).contiguous().requires_grad_()
        quantized, codes, losses = module(x)
        (quantized.square().mean() + losses.sum()).backward()
        module.eval()
        after = module(x.detach())
        results.append([quantized, codes, losses, x.grad, *after, *module.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("native")
def test_codebooks_never_filled_are_filled_as_by_the_original():
    """`ResidualVQ` and `encodec` run k-means on the first batch, be it in eval mode."""
    for name, options in (("ResidualVQ", {"kmeans_init": True}), ("encodec", {})):
        case = PLAIN[name](random.Random(1), **options)
        original = originals(case.module.eval())
        ak.accelerate(case.module)
        x = torch.randn(4, case.channels, 50)
        x = x.mT if name == "ResidualVQ" else x
        results = []
        for module in (case.module, original):
            torch.manual_seed(0)
            results.append([*module(x), *module(x), *module.state_dict().values()])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.usefixtures("native")
def test_gradients_of_a_learnable_codebook():
    """Decoding differentiates by it, so the original decodes; without gradients the operator does."""
    case = PLAIN["ResidualVQ"](random.Random(0), learnable_codebook=True, ema_update=False)
    case.module.eval()
    ak.accelerate(case.module)
    codes = torch.zeros(2, 3, case.levels, dtype=torch.int64)
    assert case.module.get_output_from_indices(codes).requires_grad
    with torch.no_grad():
        assert not case.module.get_output_from_indices(codes).requires_grad


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_cosine_codes_of_another_length():
    """The package searches with the codes as they stand, so longer ones win more often: that is not the cosine."""
    case, original = pair("ResidualVQ, cosine")
    x = torch.randn(2, 30, case.channels)
    for module in (case.module, original):
        for layer in module.layers:
            layer._codebook.embed.mul_(torch.linspace(0.5, 2, layer._codebook.embed.shape[1])[:, None])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(case.module(x), original(x), strict=True))
    ak.restore(case.module)
    assert "not of length 1" in ak.accelerate(case.module).left[0].reason
    unit_codes(case.module)
    assert ak.accelerate(case.module).replaced


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_grouped():
    """`GroupedResidualVQ` splits the channels among several `ResidualVQ`, all of which are found."""
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    options = {"dim": 24, "groups": 3, "num_quantizers": 4, "codebook_size": 64, "kmeans_init": False}
    module = package.GroupedResidualVQ(**options).eval()
    original, x = originals(module), torch.randn(2, 30, 24)
    report = ak.accelerate(module)
    assert [entry.path for entry in report.replaced] == ["rvqs.0", "rvqs.1", "rvqs.2"]
    assert not report.left
    for ours, theirs in zip(module(x), original(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    codes = module(x)[1]
    torch.testing.assert_close(module.get_output_from_indices(codes), original.get_output_from_indices(codes))
