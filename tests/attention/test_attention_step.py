"""The cached step: it is scale attention taken one scale at a time."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SEEDS, AttentionCase, attention_case, by_steps
from helpers import assert_as_accurate, error64

from aar_kernels import ScaleSchedule
from aar_kernels.attention import ScaleCache, scale_attention, scale_attention_step


def assert_steps_accurate(fast: str, case: AttentionCase) -> None:
    ours, cache = by_steps(case, fast)
    plain, plain_cache = by_steps(case, "reference")
    exact, exact_cache = by_steps(case.as_dtype(torch.float64), "reference")
    reordered = by_steps(case.reordered()[0], "reference")[0]
    plain = max(plain, reordered, key=lambda out: error64(out, exact))  # the other order of the sums was lucky
    assert cache.length == case.schedule.total
    for name, fast_result, plain_result, exact_result in (
        ("out", ours, plain, exact),
        ("cached keys", cache.k, plain_cache.k, exact_cache.k),
        ("cached values", cache.v, plain_cache.v, exact_cache.v),
    ):
        assert_as_accurate(fast_result, plain_result, exact_result, name)


@pytest.mark.parametrize("seed", [*SEEDS, "published"])
def test_steps(fast, seed):
    assert_steps_accurate(fast, attention_case(seed))


@pytest.mark.parametrize("lengths", [(1, 2, 3, 4, 5, 6, 7), (47, 48, 49), (97,), (1,) * 20])
def test_tokens_around_what_is_packed(fast, lengths):
    """Few tokens take another way through the kernel than many."""
    schedule = ScaleSchedule(lengths)
    q, k, v, grad = torch.randn(4, 2, schedule.total, 3, 64, generator=torch.Generator().manual_seed(0))
    assert_steps_accurate(fast, AttentionCase(schedule, q, k, v, grad, torch.tensor([0.0, 2.0, 5.0])))


def test_steps_are_the_whole_attention(backend):
    case = attention_case("published")
    whole = scale_attention(case.q, case.k, case.v, case.schedule, head_log_scale=case.head_log_scale, backend=backend)
    torch.testing.assert_close(by_steps(case, backend)[0], whole)


def test_the_rest_of_the_cache_is_left_alone(backend):
    """Tokens before are not written again, and room behind is neither read nor written."""
    cache = ScaleCache.empty(2, 12, 3, 32)
    generator = torch.Generator().manual_seed(0)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    q, k, v = torch.randn(3, 2, 9, 3, 32, generator=generator)
    for part in (slice(0, 4), slice(4, 9)):
        before = cache.k.clone(), cache.v.clone(), cache.length
        out = scale_attention_step(q[:, part], k[:, part], v[:, part], cache, backend=backend)
        assert out.isfinite().all()
        for now, then in zip((cache.k, cache.v), before, strict=False):
            assert torch.equal(now[:, : before[2]], then[:, : before[2]])
            assert now[:, cache.length :].isnan().all()
    assert torch.equal(cache.k[:, :9], k)
    assert torch.equal(cache.v[:, :9], v)


def test_a_reset_cache_is_as_new(backend):
    case = attention_case(1, dtype=torch.float32)
    cache = ScaleCache.empty(*case.q.shape)
    outs = []
    for _ in range(2):
        cache.reset()
        outs.append(
            scale_attention_step(
                case.q, case.k, case.v, cache, head_log_scale=case.head_log_scale, backend=backend
            )
        )
    assert torch.equal(*outs)
    assert cache.length == case.q.shape[1]


def test_a_cache_that_is_a_view(backend):
    """One allocation of all layers, of which each takes its part."""
    case = attention_case("published")
    layers = torch.zeros(2, 1, case.schedule.total, 3, 4, 64)
    views = ScaleCache(layers[0, :, :, 1], layers[1, :, :, 2])
    own = ScaleCache.empty(1, case.schedule.total, 4, 64)
    outs = [
        scale_attention_step(case.q, case.k, case.v, cache, head_log_scale=case.head_log_scale, backend=backend)
        for cache in (views, own)
    ]
    assert torch.equal(*outs)
    assert torch.equal(views.k, own.k)
    assert torch.equal(views.v, own.v)
    assert not layers[:, :, :, 0].any()
