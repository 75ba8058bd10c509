"""The Triton backend in Triton's interpreter draws the reference's codes. Few rows: the interpreter is slow."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import interpreter
from sampling_cases import draw_call, hard_rows
from test_sampling_equality import assert_equal_codes, assert_equal_weights
from test_sampling_errors import GOOD, INF, NAN

from aar_kernels.sampling import sample


@pytest.mark.parametrize("vocabulary", [1, 33, 100, 128])
@pytest.mark.parametrize("seed", range(3))
def test_random_calls(seed: int, vocabulary: int):
    assert_equal_codes("triton", **draw_call(10 * seed + vocabulary, vocabulary, rows=3))


def test_the_usual_vocabulary():
    call = draw_call(0, vocabulary=1024, rows=3) | {"guidance": 4.0, "temperature": 1.0, "top_k": 200, "top_p": 0.95}
    assert_equal_codes("triton", **call)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (1.0, 5, 0.5), (1e-300, 1, 1.0)])
def test_hard_rows(temperature: float, top_k: int, top_p: float):
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert_equal_codes("triton", logits=hard_rows(), seeds=torch.tensor([3]), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype):
    call = draw_call(1, vocabulary=50, rows=3) | {"guidance": 1.5, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    assert_equal_codes("triton", **call | {"logits": call["logits"].to(dtype), "uncond": call["uncond"].to(dtype)})


def test_weights_to_the_last_bit():
    assert_equal_weights("triton", [0.05, 0.11, 0.23, 0.31, 0.42], draws=6)


@pytest.mark.parametrize(("value", "temperature"), [(NAN, 1.0), (INF, 0.0)])
def test_values_that_cannot_be_sampled(value: float, temperature: float):
    logits = GOOD["logits"].clone()
    logits[1, 2, 4] = value
    settings = {"temperature": temperature, "top_k": 2, "top_p": 0.5, "backend": "triton"}
    for call in (GOOD | {"logits": logits}, GOOD | {"uncond": -logits, "guidance": 1.0}):
        with pytest.raises(RuntimeError, match="neither NaN nor"):
            sample(**call, **settings)
    logits[1, 2] = -INF
    with pytest.raises(RuntimeError, match="neither NaN nor"):
        sample(logits, seeds=torch.arange(2), **settings)


def test_no_tokens():
    assert sample(torch.zeros(0, 3, 5), seeds=torch.arange(0), backend="triton").shape == (0, 3)


def test_views_and_opcheck():
    call = draw_call(2, vocabulary=20, rows=6) | {"guidance": 1.0, "temperature": 1.0, "position": 0}
    strided = {name: torch.stack([call[name]] * 2, -1)[..., 0] for name in ("logits", "uncond", "seeds")}
    assert_equal_codes("triton", **call | strided)
    arguments = call["logits"], call["uncond"], call["seeds"], 0, 1.0, 1.0, 5, 0.9, "triton"
    torch.library.opcheck(torch.ops.aar_kernels.sampling_sample.default, arguments)


interpreter.isolate(globals())
