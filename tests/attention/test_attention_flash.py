"""The flash-attn backend with that library replaced: what it is given, and what is done with its answer."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from torch import Tensor

from aar_kernels import ScaleSchedule, dispatch
from aar_kernels.attention import ScaleCache, flash, reference

LENGTHS = ScaleSchedule((1, 3, 5, 9))


def attend(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> Tensor:
    """What both versions compute, in fp32."""
    assert q.dtype == k.dtype == v.dtype
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


@pytest.fixture(params=["flash-attn 2", "flash-attn 4"])
def library(request, monkeypatch) -> None:
    """Version 4 comes without the functions of version 2, and returns the logarithms of the sums too."""
    package, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    if request.param == "flash-attn 2":
        package.flash_attn_with_kvcache = lambda q, k, v, **options: attend(q, k, v, **options).to(q.dtype)
    else:
        cute.flash_attn_func = lambda q, k, v, **options: (attend(q, k, v, **options).to(q.dtype), None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    flash._library.cache_clear()
    yield
    flash._library.cache_clear()


@pytest.mark.parametrize("softmax_scale", [1.0, -0.3])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_step(library, dtype: torch.dtype, cosine: bool, softmax_scale: float):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, LENGTHS.total, 3, 32, generator=generator).to(dtype) for _ in range(3))
    scale = torch.tensor([0.5, 2.0, 9.0]) if cosine else None

    def run(backend, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        cache, out = ScaleCache.empty(2, LENGTHS.total, 3, 32, dtype=dtype), []
        gain = scale if scale is None or dtype != torch.float64 else scale.double()
        for part in LENGTHS.slices():
            new = (x[:, part].to(dtype) for x in (q, k, v))
            out.append(backend.step(*new, cache.k, cache.v, gain, part.start, softmax_scale))
        return torch.cat(out, dim=1), cache.k, cache.v

    results = zip(run(flash, dtype), run(reference, dtype), run(reference, torch.float64), strict=True)
    for name, (fast, plain, exact) in zip(("out", "keys", "values"), results, strict=True):
        assert_as_accurate(fast, plain, exact, name)


def test_operator(library):
    q, k, v = torch.randn(3, 1, 4, 2, 32).half()
    cache = ScaleCache.empty(1, 6, 2, 32, dtype=torch.float16)
    cache.k.zero_(), cache.v.zero_()
    arguments = (q, k, v, cache.k, cache.v, torch.zeros(2), 2, 1.0, "flash")
    torch.library.opcheck(torch.ops.aar_kernels.attention_step, arguments)


def test_what_it_refuses(library, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert flash.unavailable() is None

    def reason(**problem) -> str | None:
        usual = {"operator": "attention_step", "device": "cuda", "dtype": torch.bfloat16, "dim": 64}
        return flash.unsupported(dispatch.Problem(**usual | problem))

    assert reason() is None
    assert "bfloat16 or float16 only" in reason(dtype=torch.float32)
    assert "head_dim 32 to 128" in reason(dim=36)
    assert "head_dim 32 to 128" in reason(dim=256)
    assert reason(device="cpu") == "runs on CUDA"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in flash.unavailable()


def test_it_says_why_it_is_missing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash._library.cache_clear()
    assert "flash-attn cannot be imported" in flash.unavailable()
    flash._library.cache_clear()


def test_only_the_step_is_offered():
    reasons = dispatch.operators()
    assert reasons["attention_forward"]["flash"] == "has no kernel for this operator"
    if not torch.cuda.is_available():
        assert reasons["attention_step"]["flash"] == "no CUDA device"
