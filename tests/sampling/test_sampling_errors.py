"""Bad input: the same error on every backend, and nothing read outside a buffer."""

from __future__ import annotations

import pytest
import torch

from aar_kernels import BackendError
from aar_kernels.sampling import sample

INF, NAN = float("inf"), float("nan")
GOOD = {"logits": torch.zeros(2, 3, 5), "uncond": torch.zeros(2, 3, 5), "seeds": torch.arange(2)}


@pytest.mark.parametrize(
    "bad",
    [
        {"guidance": -0.1},
        {"guidance": NAN},
        {"guidance": INF},
        {"guidance": 1.0, "uncond": None},
        {"temperature": -1.0},
        {"temperature": NAN},
        {"temperature": INF},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": NAN},
        {"position": -1},
        {"position": 1 << 62},
        {"logits": torch.zeros(3, 5)},
        {"logits": torch.zeros(2, 3, 0), "uncond": torch.zeros(2, 3, 0)},
        {"logits": torch.zeros(2, 1, 65537), "uncond": None},
        {"logits": torch.zeros(2, 3, 5, dtype=torch.float64), "uncond": None},
        {"logits": torch.zeros(2, 3, 5, dtype=torch.int64), "uncond": None},
        {"uncond": torch.zeros(2, 3, 6)},
        {"uncond": torch.zeros(2, 3, 5, dtype=torch.float16)},
        {"seeds": torch.arange(3)},
        {"seeds": torch.arange(2, dtype=torch.int32)},
        {"seeds": torch.zeros(2, dtype=torch.int64, device="meta")},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(backend, bad):
    with pytest.raises(ValueError, match="must be"):
        sample(**GOOD | bad, backend=backend)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 2, 4), (1, 1, 2)])
@pytest.mark.parametrize("value", [NAN, INF])
def test_values_that_cannot_be_sampled(backend, value, where, temperature):
    logits = torch.zeros(2, 3, 5)
    logits[where] = value
    for call in (GOOD | {"logits": logits}, GOOD | {"uncond": logits, "guidance": 1.0}):
        if value == INF and "guidance" in call:
            call["uncond"] = -logits
        with pytest.raises(RuntimeError, match="neither NaN nor"):
            sample(**call, temperature=temperature, backend=backend)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_with_no_code(backend, temperature):
    logits = torch.zeros(2, 3, 5)
    logits[1, 2] = -INF
    with pytest.raises(RuntimeError, match="neither NaN nor"):
        sample(logits, seeds=torch.arange(2), temperature=temperature, top_k=2, top_p=0.5, backend=backend)


def test_guidance_that_overflows(backend):
    logits = torch.full((2, 3, 5), 3e38)
    with pytest.raises(RuntimeError, match="neither NaN nor"):
        sample(logits, uncond=-logits, guidance=1.0, seeds=torch.arange(2), backend=backend)


def test_masked_codes_stay_masked_whatever_their_unconditional_half(backend):
    logits, uncond = torch.zeros(1, 4, 5), torch.zeros(1, 4, 5)
    logits[..., 1:] = -INF
    uncond[0, :, 1:] = torch.tensor([-INF, INF, NAN, 0.0])
    codes = sample(logits, uncond=uncond, guidance=1.0, seeds=torch.arange(1), backend=backend)
    assert codes.count_nonzero() == 0


def test_uncond_is_not_read_without_guidance(backend):
    uncond = torch.full((2, 3, 5), NAN)
    codes = sample(torch.zeros(2, 3, 5), uncond=uncond, seeds=torch.arange(2), backend=backend)
    assert torch.equal(codes, sample(torch.zeros(2, 3, 5), seeds=torch.arange(2), backend=backend))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (0, 0, 1)])
def test_no_tokens(backend, shape):
    logits, seeds = torch.zeros(shape), torch.arange(shape[0])
    for settings in ({}, {"temperature": 0.0}, {"uncond": logits, "guidance": 2.0, "top_k": 2, "top_p": 0.5}):
        codes = sample(logits, seeds=seeds, backend=backend, **settings)
        assert (codes.shape, codes.dtype) == (shape[:2], torch.int64)


def test_a_backend_that_cannot():
    with pytest.raises(BackendError, match="flash"):
        sample(**GOOD, backend="flash")
