"""The operators as citizens of PyTorch: derivatives, operator checks, compilation, layouts, FlexAttention."""

from __future__ import annotations

import pytest
import torch
from attention_cases import AttentionCase, attention_case, by_steps, forward_and_gradients
from torch.nn.attention.flex_attention import flex_attention

from aar_kernels import ScaleSchedule, use_backend
from aar_kernels.attention import ScaleCache, scale_attention, scale_attention_step
from aar_kernels.attention.reference import LARGEST_LOG_SCALE

SCHEDULE = ScaleSchedule((1, 2, 3))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("cosine", [True, False])
def test_gradcheck(cosine):
    """Of the definition, in float64; one head lies above the limit of the scale."""
    q, k, v = (tensor.requires_grad_() for tensor in random(3, 2, 6, 2, 3, dtype=torch.float64))
    scale = torch.tensor([1.0, 5.0], dtype=torch.float64, requires_grad=True) if cosine else None

    def run(q, k, v, scale=None):
        return scale_attention(q, k, v, SCHEDULE, head_log_scale=scale)

    torch.autograd.gradcheck(run, [q, k, v, scale][: 4 if cosine else 3], fast_mode=True)


def operator_arguments(name: str, backend: str, seed: int) -> tuple:
    case = attention_case(seed)
    leaves = [leaf.requires_grad_(name == "forward") for leaf in case.leaves()]
    scale = leaves[3] if len(leaves) == 4 else None
    if name == "step":
        cache = ScaleCache.empty(len(case.q), 300, *case.q.shape[2:], dtype=case.q.dtype)
        for tensor in (cache.k, cache.v):
            tensor.copy_(random(*tensor.shape))
        return *leaves[:3], cache.k, cache.v, scale, 5, 0.5, backend
    forward = (*leaves[:3], scale, case.schedule.lengths, 0.5, backend)
    if name == "forward":
        return forward
    return case.grad, *forward[:4], *torch.ops.aar_kernels.attention_forward(*forward), *forward[4:]


@pytest.mark.parametrize("seed", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["forward", "backward", "step"])
def test_opcheck(fast, name, seed):
    """Schema, fake implementation, autograd registration, and tracing with dynamic shapes."""
    operator = getattr(torch.ops.aar_kernels, f"attention_{name}").default
    torch.library.opcheck(operator, operator_arguments(name, fast, seed))


def test_only_what_needs_a_gradient_gets_one(backend):
    for needed in range(4):
        case = attention_case(0)
        leaves = case.leaves()
        leaves[needed].requires_grad_()
        out = scale_attention(case.q, case.k, case.v, case.schedule, head_log_scale=leaves[3], backend=backend)
        (grad,) = torch.autograd.grad(out, leaves[needed], case.grad)
        assert grad.abs().sum() > 0


def test_no_gradient_above_the_limit(backend):
    case = attention_case("published")
    case.head_log_scale.copy_(torch.tensor([LARGEST_LOG_SCALE + 0.1, 4.0, 9.0, LARGEST_LOG_SCALE - 0.1]))
    grad = forward_and_gradients(case, backend)["head_log_scale"]
    assert ((grad == 0) == torch.tensor([True, False, True, False])).all()


# ------------------------------------------------------------------------------------------------------
# layouts


@pytest.mark.parametrize("layout", ["one projection", "heads first", "channels strided"])
def test_layouts(fast, layout):
    """Views give what their copies give."""
    case = attention_case("published", layout=layout, cosine=True)
    copies = AttentionCase(
        case.schedule, *(tensor.contiguous() for tensor in (case.q, case.k, case.v)), case.grad, case.head_log_scale
    )
    assert not case.q.is_contiguous()
    ours, expected = (forward_and_gradients(each.as_dtype(torch.float32), fast) for each in (case, copies))
    for name, wanted in expected.items():
        torch.testing.assert_close(ours[name], wanted, msg=name)
    steps, expected_steps = by_steps(case, fast)[0], by_steps(copies, fast)[0]
    torch.testing.assert_close(steps, expected_steps)


def test_the_gradient_of_one_projection(fast):
    """q, k and v are views of one tensor, which gets the sum of what reaches them."""
    case = attention_case("published")
    grads = []
    for backend in (fast, "reference"):
        projected = random(1, 455, 3, 4, 64).requires_grad_()
        q, k, v = projected.unbind(2)
        out = scale_attention(q, k, v, case.schedule, head_log_scale=case.head_log_scale, backend=backend)
        grads.append(torch.autograd.grad(out, projected, case.grad)[0])
    torch.testing.assert_close(*grads)


def test_an_expanded_gradient(backend):
    """What `sum` sends back has no memory of its own."""
    results = []
    for expanded in (True, False):
        case = attention_case("published")
        case.q.requires_grad_()
        out = scale_attention(case.q, case.k, case.v, case.schedule, backend=backend)
        loss = out.sum() if expanded else (out * torch.ones_like(out)).sum()
        results.append(torch.autograd.grad(loss, case.q)[0])
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------------------------
# compilation


def test_compiled(backend):
    assert_compiled_equals_eager(backend, "aot_eager")


def test_compiled_by_inductor(fast):
    assert_compiled_equals_eager(fast, "inductor")


def assert_compiled_equals_eager(backend: str, compiler: str) -> None:
    torch.compiler.reset()
    case = attention_case(0, dtype=torch.float32, cosine=True)

    def run(q, k, v, scale):
        return scale_attention(q * 1.0, k, v, case.schedule, head_log_scale=scale)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    results = []
    with use_backend(backend):
        for function in (compiled, run):
            leaves = [leaf.detach().clone().requires_grad_() for leaf in case.leaves()]
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, case.grad)])
    torch.compiler.reset()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_compiled_steps(backend):
    """The caches are written by compiled code as by eager code."""
    torch.compiler.reset()
    case = attention_case(0, dtype=torch.float32, cosine=True)

    def two_steps(q, k, v, scale, cache_k, cache_v):
        cache = ScaleCache(cache_k, cache_v)
        first = scale_attention_step(q[:, :3], k[:, :3], v[:, :3], cache, head_log_scale=scale)
        second = scale_attention_step(q[:, 3:8], k[:, 3:8], v[:, 3:8], cache, head_log_scale=scale)
        return torch.cat([first, second], dim=1), cache_k * 1.0

    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    results = []
    with use_backend(backend):
        for function in (compiled, two_steps):
            caches = torch.zeros_like(case.q), torch.zeros_like(case.v)
            results.append([*function(*case.leaves(), *caches), *caches])
    torch.compiler.reset()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_step_counts_as_a_change_of_the_cache(backend):
    """So that autograd notices where a cache that it saved was written since."""
    cache = ScaleCache.empty(1, 4, 2, 32)
    versions = cache.k._version, cache.v._version
    q = random(1, 2, 2, 32)
    scale_attention_step(q, q, q, cache, backend=backend)
    assert cache.k._version > versions[0]
    assert cache.v._version > versions[1]


# ------------------------------------------------------------------------------------------------------
# the rest


def test_inference_mode(backend):
    case = attention_case(1, dtype=torch.float32)
    with torch.inference_mode():
        inside = by_steps(case, backend)[0]
    assert torch.equal(inside, by_steps(case, backend)[0])


def test_results_do_not_depend_on_the_run(backend):
    runs = [forward_and_gradients(attention_case("published"), backend) for _ in range(2)]
    for name, result in runs[0].items():
        assert torch.equal(result, runs[1][name]), name


@pytest.mark.parametrize("length", [None, 455, 300, 7])
def test_flex_attention_with_the_schedules_block_mask(length):
    schedule = ScaleSchedule.quadratic(16, 75)
    q, k, v = random(3, 1, length or schedule.total, 2, 32)
    mask = schedule.to_block_mask(length, device="cpu")
    out = flex_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)), block_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, scale_attention(q, k, v, schedule, backend="reference"))


@pytest.mark.parametrize("length", [0, 7, -1])
def test_a_block_mask_of_a_wrong_length(length):
    with pytest.raises(ValueError, match=r"length must be 1 to 6, got"):
        SCHEDULE.to_block_mask(length)
