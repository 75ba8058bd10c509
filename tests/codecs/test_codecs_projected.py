"""Factorised quantizers of other packages give the same results when they are accelerated."""

from __future__ import annotations

import math
import random

import pytest
import torch
from codec_cases import originals, signature
from codec_packages import load
from factorised_cases import FACTORISED, assert_same, flat, make_factorised

import aar_kernels as ak


def pair(name: str, seed: int = 0):
    """The case, and a copy of its module as the package wrote it."""
    case = make_factorised(name, random.Random(f"{name} {seed}"))
    original = originals(case.module)
    report = ak.accelerate(case.module)
    assert len(report.replaced) == 1, report
    return case, original


def arguments(name: str, count: int) -> tuple:
    return () if name == "snac" else (count,)


def sequence(case, batch: int, frames: int, seed: int = 0) -> torch.Tensor:
    """``[batch, channels, T]`` with about so many frames, a multiple of the strides."""
    length = math.lcm(*case.strides) * max(1, frames // math.lcm(*case.strides))
    return torch.randn(batch, case.channels, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", FACTORISED)
@torch.no_grad()
def test_all_results(name, seed):
    """Over random shapes and numbers of levels; an item's codes do not depend on its neighbours."""
    case, original = pair(name, seed)
    rng = random.Random(seed)
    x = sequence(case, rng.randint(1, 8), rng.choice((1, 2, 7, 31, 100)), seed)
    for count in {1, rng.randint(1, case.levels), case.levels, case.levels + 3}:
        if name == "snac" and count != case.levels:
            continue
        ours, theirs = case.module(x, *arguments(name, count)), original(x, *arguments(name, count))
        assert len(ours) == len(theirs)
        if assert_same(ours[1], theirs[1], original, case.strides[:count], x):
            for a, b in zip(ours, theirs, strict=True):
                if isinstance(a, torch.Tensor):
                    assert a.dtype == b.dtype
                    torch.testing.assert_close(a, b)
        alone = [flat(case.module(item[None], *arguments(name, count))[1]) for item in x]
        assert torch.equal(torch.cat(alone), flat(ours[1]))
        torch.testing.assert_close(case.decode(case.module, theirs[1]), case.decode(original, theirs[1]))
        if name != "snac":
            ours, theirs = case.module.from_codes(theirs[1]), original.from_codes(theirs[1])
            assert torch.equal(ours[1], theirs[1])
            assert torch.equal(ours[2], theirs[2])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", FACTORISED)
@torch.no_grad()
def test_a_long_input(name):
    case, original = pair(name)
    x = sequence(case, 1, 9000)
    assert_same(case.module(x)[1], original(x)[1], original, case.strides, x)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", FACTORISED)
@torch.no_grad()
def test_the_fused_operators_run(name, monkeypatch):
    case, _ = pair(name)

    def fail(*_):
        raise AssertionError("the original runs")

    for method in ("forward", "from_codes"):
        monkeypatch.setattr(type(case.module)._aar_original, method, fail)
    case.decode(case.module, case.module(sequence(case, 2, 8))[1])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", FACTORISED)
@torch.no_grad()
def test_values_that_no_codebook_knows(name):
    """NaN, Inf, and codes outside the codebook have the original's answer."""
    case, original = pair(name)
    x = sequence(case, 2, 16)
    codes = original(x)[1]
    x[0, 0, 3], x[1, 1, 4] = float("nan"), float("inf")
    assert torch.equal(flat(case.module(x)[1]), flat(original(x)[1]))
    for wrong in (-1, 10**6):
        codes[0][0] = wrong
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            case.decode(original, codes)
        with pytest.raises(type(theirs.value)):
            case.decode(case.module, codes)


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_lengths_that_snac_cannot_take():
    case, original = pair("snac", 1)
    assert max(case.strides) > 1
    x = sequence(case, 1, 40)[..., :-1]
    for module in (case.module, original):
        with pytest.raises(RuntimeError, match="must match the size"):
            module(x)


@pytest.mark.parametrize("name", FACTORISED)
def test_signatures(name):
    case, original = pair(name)
    for method in ("forward", "from_codes"):
        assert signature(getattr(case.module, method)) == signature(getattr(original, method))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FACTORISED)
def test_gradients_are_the_originals(name, training):
    """Training forward with quantizer dropout, losses, and every gradient; in eval mode too."""
    case, original = pair(name)
    results = []
    for module in (case.module.train(training), original.train(training)):
        torch.manual_seed(0)
        x = sequence(case, 4, 16).requires_grad_()
        quantized, _, *losses = module(x)
        (quantized.square().mean() + sum(loss.mean() for loss in losses)).backward()
        grads = [parameter.grad for parameter in module.parameters()]
        results.append([quantized, *losses, x.grad, *(grad for grad in grads if grad is not None)])
    assert len(results[0]) == len(results[1]) > 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", FACTORISED)
def test_weights_are_read_live(name):
    """After a training step, `load_state_dict`, and `.to()` and back."""
    case, _ = pair(name, 2)
    x = sequence(case, 2, 16)

    def check() -> torch.Tensor:
        fresh = make_factorised(name, random.Random(f"{name} 2")).module
        fresh.load_state_dict(case.module.state_dict())
        with torch.no_grad():
            ours, theirs = case.module(x), fresh(x)
        assert_same(ours[1], theirs[1], fresh, case.strides, x)
        torch.testing.assert_close(case.decode(case.module, theirs[1]), case.decode(fresh, theirs[1]))
        return flat(ours[1])

    seen = [check()]
    optimizer = torch.optim.SGD(case.module.parameters(), lr=30.0)
    quantized, _, *losses = case.module.train()(x)
    (quantized.square().mean() + sum(loss.mean() for loss in losses)).backward()
    optimizer.step()
    case.module.eval()
    seen.append(check())
    case.module.load_state_dict(pair(name, 2)[1].state_dict())
    seen.append(check())
    assert torch.equal(seen[2], seen[0])
    assert not torch.equal(seen[1], seen[0])
    case.module.double().float()
    assert torch.equal(check(), seen[2])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FACTORISED)
def test_codebooks_are_packed_once(name, mode, monkeypatch):
    case, _ = pair(name)
    packed, pack = [], torch.ops.aar_native.msrq_pack
    monkeypatch.setattr(torch.ops.aar_native, "msrq_pack", lambda *args: packed.append(1) or pack(*args))
    with mode():
        for _ in range(3):
            case.decode(case.module, case.module(sequence(case, 2, 16))[1])
    assert len(packed) == 1


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_whole_models():
    """Codes and sound of a DAC and a SNAC."""
    from transformers import DacConfig, DacModel

    torch.manual_seed(0)
    config = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 4], "decoder_hidden_size": 16, "n_codebooks": 3}
    model = DacModel(DacConfig(**config, codebook_size=64)).eval()
    wav = torch.randn(2, 1, 400)
    before = model.encode(wav)
    sound = model.decode(before.quantized_representation).audio_values, model.decode(audio_codes=before.audio_codes)
    ak.accelerate(model)
    after = model.encode(wav)
    assert len(before.audio_codes.unique()) > 10
    assert torch.equal(before.audio_codes, after.audio_codes)
    torch.testing.assert_close(model.decode(after.quantized_representation).audio_values, sound[0])
    torch.testing.assert_close(model.decode(audio_codes=after.audio_codes).audio_values, sound[1].audio_values)

    package = load("snac")
    model = package.SNAC(
        24000, 4, [2, 4], decoder_dim=16, decoder_rates=[4, 2], attn_window_size=None, codebook_size=50,
        vq_strides=[4, 2, 1], noise=False,
    ).eval()  # fmt: skip
    codes, sound = model.encode(wav), model(wav)[0]
    ak.accelerate(model)
    assert len(flat(codes).unique()) > 10
    assert all(torch.equal(a, b) for a, b in zip(codes, model.encode(wav), strict=True))
    torch.testing.assert_close(model.decode(codes)[..., :400], sound)
    torch.testing.assert_close(model(wav)[0], sound)


@torch.no_grad()
def test_what_is_left_alone_and_why():
    case = make_factorised("snac", random.Random(0))
    case.module.quantizers[0].in_proj = torch.nn.Conv1d(case.channels, 8, 3, padding=1)
    report = ak.accelerate(case.module)
    assert not report.replaced
    assert "not a 1x1 convolution" in report.left[0].reason
    package = load("dac.nn.quantize")
    report = ak.accelerate(package.ResidualVectorQuantize(16, 2, 20, [8, 4]))
    assert "differ in size" in report.left[0].reason
    text = str(ak.accelerate(make_factorised("snac", random.Random(0)).module))
    assert "cosine in 8 of" in text
