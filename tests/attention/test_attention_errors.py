"""Wrong input meets the same answer on every backend: an error that names what is wrong, or a documented result."""

from __future__ import annotations

import pytest
import torch
from attention_cases import attention_case, forward_and_gradients

from aar_kernels import BackendError, ScaleSchedule
from aar_kernels.attention import ScaleCache, scale_attention, scale_attention_step

SCHEDULE = ScaleSchedule((1, 2, 4))
Q = torch.randn(2, 7, 3, 32, generator=torch.Generator().manual_seed(0))
SCALE = torch.zeros(3)


@pytest.mark.parametrize("q", [Q[0], Q[:, :0], Q[..., :0], Q[:, :, :0], Q.long(), Q[None]])
def test_wrong_queries(backend, q):
    with pytest.raises(ValueError, match=r"q must be floating point \[batch, length, heads, head_dim\], got"):
        scale_attention(q, q, q, SCHEDULE, backend=backend)


@pytest.mark.parametrize("other", [Q[:1], Q[:, :6], Q[:, :, :2], Q[..., :16], Q.double(), Q.bfloat16()])
def test_keys_and_values_are_as_queries(backend, other):
    with pytest.raises(ValueError, match="k must be as q"):
        scale_attention(Q, other, Q, SCHEDULE, backend=backend)
    with pytest.raises(ValueError, match="v must be as q"):
        scale_attention(Q, Q, other, SCHEDULE, backend=backend)


@pytest.mark.parametrize("scale", [SCALE[:2], SCALE[None], SCALE.double(), SCALE.long(), torch.zeros(())])
def test_wrong_head_scale(backend, scale):
    with pytest.raises(ValueError, match=r"head_log_scale must be fp32 or torch.float32 \[3\], got"):
        scale_attention(Q, Q, Q, SCHEDULE, head_log_scale=scale, backend=backend)


def test_more_tokens_than_the_schedule(backend):
    with pytest.raises(ValueError, match="q has 7 tokens, the schedule 1 to 6"):
        scale_attention(Q, Q, Q, ScaleSchedule((1, 2, 3)), backend=backend)


def test_a_full_cache(backend):
    cache = ScaleCache.empty(2, 9, 3, 32)
    scale_attention_step(Q, Q, Q, cache, backend=backend)
    with pytest.raises(ValueError, match="3 more tokens do not fit: the cache holds 7 of 9"):
        scale_attention_step(Q[:, :3], Q[:, :3], Q[:, :3], cache, backend=backend)
    assert cache.length == 7


@pytest.mark.parametrize(
    "cache", [ScaleCache.empty(1, 9, 3, 32), ScaleCache.empty(2, 9, 3, 32, dtype=torch.bfloat16)]
)
def test_a_cache_for_other_tokens(backend, cache):
    with pytest.raises(ValueError, match="as the cache"):
        scale_attention_step(Q, Q, Q, cache, backend=backend)


def test_a_cache_whose_channels_are_strided(backend):
    cache = ScaleCache(*torch.zeros(2, 2, 9, 32, 3).mT)
    with pytest.raises(ValueError, match="channels must be contiguous"):
        scale_attention_step(Q, Q, Q, cache, backend=backend)


def test_a_step_has_no_gradient(backend):
    with pytest.raises(ValueError, match="not differentiable"):
        scale_attention_step(Q.clone().requires_grad_(), Q, Q, ScaleCache.empty(2, 9, 3, 32), backend=backend)


def test_a_forced_backend_that_cannot_run_says_why_for_all():
    double = Q.double()
    with pytest.raises(BackendError) as error:
        scale_attention(double, double, double, SCHEDULE, backend="native")
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["native", "flash", "triton", "reference"]


def test_double_falls_back_to_the_reference():
    double = Q.double()
    out = scale_attention(double, double, double, SCHEDULE)
    assert torch.equal(out, scale_attention(double, double, double, SCHEDULE, backend="reference"))


def test_an_empty_batch(backend):
    q = Q[:0].clone().requires_grad_()
    scale = SCALE.clone().requires_grad_()
    out = scale_attention(q, q, q, SCHEDULE, head_log_scale=scale, backend=backend)
    assert out.shape == q.shape
    grads = torch.autograd.grad(out.sum(), (q, scale))
    assert grads[0].shape == q.shape
    assert not grads[1].any()
    cache = ScaleCache.empty(0, 7, 3, 32)
    assert scale_attention_step(Q[:0], Q[:0], Q[:0], cache, backend=backend).shape == q.shape
    assert cache.length == 7


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("cosine", [True, False])
def test_nan_and_inf_in_queries_or_keys(backend, bad, cosine):
    """Rows that see it are what plain PyTorch makes of it, and all others do not notice."""
    case = attention_case("published", batch=2, cosine=cosine)
    arguments = {"head_log_scale": case.head_log_scale, "backend": backend}
    clean = scale_attention(case.q, case.k, case.v, case.schedule, **arguments)
    q, k = case.q.clone(), case.k.clone()
    q[0, 5, 1, 3] = bad
    k[1, 20, 2, 0] = bad  # of the scale of tokens 13 to 21
    out = scale_attention(q, k, case.v, case.schedule, **arguments)
    changed = torch.zeros(out.shape[:3], dtype=torch.bool)
    changed[0, 5, 1] = True
    changed[1, 13:, 2] = True
    assert torch.equal(out[~changed], clean[~changed])
    expected = scale_attention(q, k, case.v, case.schedule, **arguments | {"backend": "reference"})
    assert torch.equal(out[changed].isnan(), expected[changed].isnan())
    assert out[0, 5, 1].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_in_values(fast, bad):
    """Even within a tile of rows of which some see it. (In the reference 0 * NaN spreads over the head.)"""
    case = attention_case("published")
    v = case.v.clone()
    v[0, 20, 2, 0] = bad
    arguments = {"head_log_scale": case.head_log_scale, "backend": fast}
    out = scale_attention(case.q, case.k, v, case.schedule, **arguments)
    clean = scale_attention(case.q, case.k, case.v, case.schedule, **arguments)
    assert not out[0, 13:, 2, 0].isfinite().any()
    clean[0, 13:, 2, 0] = out[0, 13:, 2, 0] = 0
    assert torch.equal(out, clean)


def test_nan_in_the_gradient(fast):
    """Reaches keys and values that its row sees, no others."""
    case = attention_case("published")
    clean = forward_and_gradients(case, fast)
    case.grad[0, 20, 1, 0] = torch.nan
    grads = forward_and_gradients(case, fast)
    for name in ("k", "v"):
        unseen = grads[name][0, 22:, 1]
        assert torch.equal(unseen, clean[name][0, 22:, 1])
    assert grads["v"][0, :22, 1, 0].isnan().all()
    assert grads["q"][0, 20, 1].isnan().all()


def test_nan_scale(backend):
    scale = torch.tensor([0.0, torch.nan, 1.0])
    out = scale_attention(Q, Q.flip(1), Q, SCHEDULE, head_log_scale=scale, backend=backend)
    assert out[:, :, 1].isnan().all()
    assert out[:, :, [0, 2]].isfinite().all()
