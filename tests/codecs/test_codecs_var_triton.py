"""VAR's quantizer and attention on the Triton backend, in its interpreter. Small cases: it is slow."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import interpreter
import test_codecs_var as var
import var_plain
from codec_cases import originals
from quantization.cases import assert_codes
from quantization.grid_cases import GridCase
from torch import nn

import aar_kernels as ak
from aar_kernels import ScaleSchedule

CLASSES = var_plain.VectorQuantizer2, var_plain.SelfAttention
SIDES = (1, 2, 3)


def pair(module: nn.Module, monkeypatch, *fused: str) -> tuple[nn.Module, nn.Module]:
    """A module on Triton, whose methods ``fused`` are not the original's, and a copy as it was."""

    def fail(*_, **__):
        raise AssertionError("the original runs")

    original = originals(module)
    assert len(ak.accelerate(module, backend="triton").replaced) == 1
    # The copy keeps those methods, which its class loses.
    original.__class__ = type("Original", (type(original),), {name: getattr(type(original), name) for name in fused})
    for name in fused:
        monkeypatch.setattr(type(module)._aar_original, name, fail)
    return module, original


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"using_znorm": True, "share_quant_resi": 0, "quant_resi": 0.3}])
def test_quantizer(options, monkeypatch):
    module = var.quantizer(CLASSES, vocab_size=50, Cvae=8, v_patch_nums=SIDES, **options)
    fused = "f_to_idxBl_or_fhat", "idxBl_to_var_input", "embed_to_fhat", "get_next_autoregressive_input", "forward"
    module, original = pair(module, monkeypatch, *fused)
    x = var.images(module, 2)
    codes, theirs = (each.f_to_idxBl_or_fhat(x, False) for each in (module, original))
    assert_codes(torch.cat(codes, dim=1), GridCase(var.levels_of(original, SIDES), x, None))
    assert all(map(torch.equal, codes, theirs))
    for ours, expected in zip(module.f_to_idxBl_or_fhat(x, True), original.f_to_idxBl_or_fhat(x, True), strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(module(x)[2], original(x)[2])
    torch.testing.assert_close(*(each.idxBl_to_var_input(codes) for each in (module, original)))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 8, side, side, generator=generator) for side in SIDES]
    torch.testing.assert_close(*(each.embed_to_fhat(rows, last_one=True) for each in (module, original)))
    for s in (1, 2):
        results = [each.get_next_autoregressive_input(s, 3, x.clone(), rows[s]) for each in (module, original)]
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_attention(monkeypatch):
    schedule = ScaleSchedule((1, 4, 9))  # heads of 32 channels: Triton has none of fewer
    module, original = pair(var.attention(CLASSES, cosine=True, heads=1, head_dim=32), monkeypatch, "forward")
    x = var.tokens(2, schedule.total, 32)
    masked = module(x, var.masking(schedule))
    torch.testing.assert_close(masked, original(x, var.masking(schedule)), rtol=1e-4, atol=1e-5)
    module.kv_caching(True)
    steps = [module(x[:, part], None) for part in schedule.slices()]
    torch.testing.assert_close(torch.cat(steps, dim=1), masked, rtol=1e-4, atol=1e-5)


interpreter.isolate(globals())
