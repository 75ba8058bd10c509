"""The quantizer of Higgs Audio 2 in transformers gives the same results when it is accelerated."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from codec_cases import fill, originals, signature
from codec_packages import load
from quantization.projected_cases import assert_projected_codes

import aar_kernels as ak
from aar_kernels.quantization import ProjectedLevels


def pair(seed: int):
    """A quantizer accelerated, and a copy as the package wrote it."""
    rng = random.Random(seed)
    higgs = load("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    torch.manual_seed(seed)
    config = SimpleNamespace(  # what its constructor reads of a configuration
        hidden_size=rng.choice((16, 40)), codebook_dim=rng.choice((3, 8, 20)), codebook_size=rng.choice((32, 64)),
        num_quantizers=rng.randint(1, 6), frame_rate=25,
    )  # fmt: skip
    module = fill(higgs.HiggsAudioV2TokenizerResidualVectorQuantization(config).eval(), seed)
    original = originals(module)
    report = ak.accelerate(module)
    assert len(report.replaced) == 1, report
    return module, original, config


def bandwidth(module, count: int) -> float:
    return 1.001 * count * module.get_bandwidth_per_quantizer()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_codes_and_decoding(seed):
    module, original, config = pair(seed)
    rng = random.Random(seed)
    x = torch.randn(rng.randint(1, 8), config.hidden_size, rng.choice((1, 7, 50)))
    levels = original.quantizers
    parts = [
        [level.codebook.embed for level in levels],
        *([getattr(level.project_in, name) for level in levels] for name in ("weight", "bias")),
        *([getattr(level.project_out, name) for level in levels] for name in ("weight", "bias")),
    ]
    weights = [torch.stack(part) for part in parts]
    for count in {1, config.num_quantizers}:
        codes, theirs = (each.encode(x, bandwidth(module, count)) for each in (module, original))
        assert codes.shape == theirs.shape == (count, len(x), x.shape[2])
        judged = ProjectedLevels(*weights, [1] * count, "euclidean")
        for each in (codes, theirs):
            assert_projected_codes(each.transpose(0, 1).flatten(1), judged, x)
        assert (codes != theirs).any(dim=0).sum() <= 1 + x[:, 0].numel() / 50
        alone = [module.encode(item[None], bandwidth(module, count)) for item in x]
        assert torch.equal(torch.cat(alone, dim=1), codes)
        torch.testing.assert_close(module.decode(theirs), original.decode(theirs))


@pytest.mark.usefixtures("native")
def test_the_fused_operators_run(monkeypatch):
    """Codes have no gradient, so they are ours with gradients enabled too; decoding is not, for it has one."""
    module, original, config = pair(0)

    def fail(*_):
        raise AssertionError("the original runs")

    codes = original.encode(torch.randn(2, config.hidden_size, 5))
    assert module.decode(codes).requires_grad
    for name in ("encode", "decode"):
        monkeypatch.setattr(type(module)._aar_original, name, fail)
    module.encode(torch.randn(2, config.hidden_size, 5))
    with torch.no_grad():
        module.decode(codes)


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_values_that_no_codebook_knows():
    module, original, config = pair(0)
    x = torch.randn(2, config.hidden_size, 9)
    x[0, 0, 3] = float("nan")
    codes = original.encode(x)
    assert torch.equal(module.encode(x), codes)
    codes[0, 0, 0] = 10**6
    for each in (module, original):
        with pytest.raises(IndexError):
            each.decode(codes)
    for name in ("encode", "decode"):
        assert signature(getattr(module, name)) == signature(getattr(original, name))
