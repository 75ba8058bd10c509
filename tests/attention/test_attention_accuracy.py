"""Attention and its gradients against float64, and what must hold exactly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SEEDS, AttentionCase, attention_case, forward_and_gradients
from helpers import assert_as_accurate, error64
from torch import Tensor

from aar_kernels import ScaleSchedule
from aar_kernels.attention import scale_attention


def assert_accurate(fast: str, case: AttentionCase) -> None:
    """The result and all gradients, each by the tolerance of its own data."""
    dtype = case.q.dtype
    ours = forward_and_gradients(case.as_dtype(dtype), fast)
    plain = plain_results(case)
    exact = forward_and_gradients(case.as_dtype(torch.float64), "reference")
    # Of two orders of the same sums, the one with more rounding is the measure: the other was lucky.
    worst = {name: max(plain, key=lambda results: error64(results[name], exact[name]))[name] for name in exact}
    for name in exact.keys() - {"head_log_scale"}:
        assert_as_accurate(ours[name], worst[name], exact[name], f"{name} {dtype} {case.schedule.lengths}")
    if "head_log_scale" in exact:
        # A single number for each head, in which every token's rounding adds up: one lucky sum is no measure.
        wanted = exact["head_log_scale"]
        tokens = case.q.shape[0] * case.q.shape[1]
        bound = 2 * error64(worst["head_log_scale"], wanted) + tokens * 2**-23 * case.grad.abs().max().item()
        assert error64(ours["head_log_scale"], wanted) <= bound
        assert ((wanted == 0) == (ours["head_log_scale"] == 0)).all() or case.schedule.total == 1


def plain_results(case: AttentionCase) -> list[dict[str, Tensor]]:
    """The reference in the case's dtype, also with the channels of queries and keys in another order."""
    other, back = case.reordered()
    reordered = forward_and_gradients(other, "reference")
    for name in ("q", "k"):
        reordered[name] = reordered[name][..., back]
    return [forward_and_gradients(case.as_dtype(case.q.dtype), "reference"), reordered]


@pytest.mark.parametrize("seed", [*SEEDS, "published"])
def test_result_and_gradients(fast, seed):
    assert_accurate(fast, attention_case(seed))


@pytest.mark.parametrize("length", [1, 5, 47, 48, 49, 95, 97])
def test_lengths_around_a_block(fast, length):
    """Also of a sequence that ends within a scale, as when a prefix is scored."""
    schedule = ScaleSchedule((1, 3, 10, 40, 60))
    q, k, v, grad = torch.randn(4, 1, length, 2, 32, generator=torch.Generator().manual_seed(length))
    case = AttentionCase(schedule, q, k, v, grad, torch.tensor([1.0, 2.0]))
    assert_accurate(fast, case)


@pytest.mark.parametrize("dim", [1, 7, 8, 33, 200])
def test_any_number_of_channels(fast, dim):
    assert_accurate(fast, attention_case(1, dim=dim, kind="unordered", dtype=torch.float32))


def test_long_sequences(fast):
    schedule = ScaleSchedule((300, 1, 900, 500))
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, schedule.total, 1, 32, generator=generator)
    assert_accurate(fast, AttentionCase(schedule, q, k, v, grad, torch.tensor([2.0])))


def test_causal_attention_is_the_special_case(backend):
    """Scales of one token: the mask of a language model, as PyTorch applies it."""
    case = attention_case(2, kind="causal", cosine=False, dtype=torch.float32)
    out = scale_attention(case.q, case.k, case.v, case.schedule, backend=backend)
    heads_first = (tensor.transpose(1, 2) for tensor in (case.q, case.k, case.v))
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_one_token_sees_itself(backend):
    case = attention_case(4, kind="one token", dtype=torch.float32)
    assert torch.equal(scale_attention(case.q, case.k, case.v, case.schedule, backend=backend), case.v)


def test_equal_keys_weigh_equally(backend):
    case = attention_case("published")
    k = case.k[:, :1].expand_as(case.k)
    out = scale_attention(case.q, k, case.v, case.schedule, head_log_scale=case.head_log_scale, backend=backend)
    ends = torch.repeat_interleave(torch.tensor(case.schedule.offsets[1:]), torch.tensor(case.schedule.lengths))
    means = case.v.double().cumsum(1)[:, ends - 1] / ends[:, None, None]
    torch.testing.assert_close(out.double(), means, atol=1e-6, rtol=1e-5)


def test_sharp_logits(fast):
    """Scale 100 and equal directions: logits up to 100, weights from 1 down to e^-200."""
    case = attention_case("published")
    case.head_log_scale.fill_(7.0)
    case.k.copy_(case.q.roll(3, dims=1) + 0.01 * case.k)
    assert_accurate(fast, case)
    limited = torch.full_like(case.head_log_scale, math.log(100.0))
    outs = [
        scale_attention(case.q, case.k, case.v, case.schedule, head_log_scale=scale, backend=fast)
        for scale in (case.head_log_scale, limited)
    ]
    assert torch.equal(*outs)


def test_logits_far_apart(fast):
    """Products in the ten thousands: exponentials that underflow, and rows that see only such differences."""
    case = attention_case(0, cosine=False, dtype=torch.float32)
    case.q.mul_(300)
    assert_accurate(fast, case)


def test_rows_of_zeros(fast):
    """F.normalize leaves them zero, and its gradient there is that of a division by 1e-12."""
    case = attention_case("published", batch=1)
    case.q[:, 3], case.k[:, 7] = 0, 0
    ours, exact = (
        forward_and_gradients(case.as_dtype(dtype), backend)
        for dtype, backend in ((torch.float32, fast), (torch.float64, "reference"))
    )
    for name, wanted in exact.items():
        error = (ours[name].double() - wanted).norm() / wanted.norm()
        assert error < 1e-5, name


def test_softmax_scale(backend):
    case = attention_case(1, dtype=torch.float32, cosine=False)
    plain = scale_attention(case.q, case.k, case.v, case.schedule, softmax_scale=0.25, backend=backend)
    scaled = scale_attention(case.q / 4, case.k, case.v, case.schedule, softmax_scale=1.0, backend=backend)
    torch.testing.assert_close(plain, scaled)


def test_scale_in_the_dtype_of_q(backend):
    case = attention_case(0, dtype=torch.bfloat16, cosine=True)
    scale = case.head_log_scale.bfloat16().requires_grad_()
    out = scale_attention(case.q, case.k, case.v, case.schedule, head_log_scale=scale, backend=backend)
    (grad,) = torch.autograd.grad(out, scale, case.grad)
    assert out.dtype == grad.dtype == torch.bfloat16
