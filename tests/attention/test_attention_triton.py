"""The Triton backend in Triton's interpreter, against the float64 reference. Small cases: the interpreter is slow."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import interpreter
from helpers import assert_as_accurate

from aar_kernels import ScaleSchedule
from aar_kernels.attention import ScaleCache, scale_attention, scale_attention_step
from aar_kernels.attention import triton as backend

LN_100 = math.log(100.0)


@pytest.fixture(autouse=True)
def _fill_empty(nan_filled_empty):
    pass


@dataclass(frozen=True)
class Case:
    """Inputs ``q, k, v[B, L, H, D]``, the first ``L`` tokens of a schedule."""

    schedule: ScaleSchedule
    q: Tensor
    k: Tensor
    v: Tensor
    head_log_scale: Tensor | None
    softmax_scale: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the scales of the heads in fp32, or everything in fp64."""
        scale = self.head_log_scale
        if scale is not None and dtype == torch.float64:
            scale = scale.double()
        return [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)] + (
            [] if scale is None else [scale.detach().clone().requires_grad_()]
        )


def make(
    length: int, dim: int = 32, dtype: torch.dtype = torch.float32, *, cosine: bool = True, lengths=None,
    batch: int = 1, heads: int = 2, softmax_scale: float | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    """A case of random scales, the last of which ``length`` may cut."""
    rng, generator = random.Random(seed + length), torch.Generator().manual_seed(seed)
    lengths = list(lengths or [])
    while sum(lengths) < length:
        lengths.append(rng.randint(1, max(2, length // 3)))
    q, k, v = torch.randn(3, batch, length, heads, dim, generator=generator).to(dtype)
    scale = torch.linspace(1, 3, heads) if cosine else None
    return Case(ScaleSchedule(lengths), q, k, v, scale, softmax_scale)


def training_step(case: Case, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """The result and every gradient."""
    tensors = case.tensors(dtype)
    q, k, v, *scale = tensors
    out = scale_attention(
        q, k, v, case.schedule, head_log_scale=scale[0] if scale else None, softmax_scale=case.softmax_scale,
        backend=name,
    )  # fmt: skip
    gradients = torch.autograd.grad(out, tensors, weights(out))
    return dict(zip(("out", "dq", "dk", "dv", "d_scale"), (out, *gradients), strict=False))


def sampling(case: Case, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """The same scale by scale."""
    batch, length, heads, dim = case.q.shape
    q, k, v, *scale = (tensor.detach() for tensor in case.tensors(dtype))
    cache, out = ScaleCache.empty(batch, length, heads, dim, dtype=dtype), []
    for part in case.schedule.slices():
        new = q[:, part], k[:, part], v[:, part]
        if new[0].shape[1]:
            out.append(
                scale_attention_step(
                    *new, cache, head_log_scale=scale[0] if scale else None, softmax_scale=case.softmax_scale,
                    backend=name,
                )  # fmt: skip
            )
    return {"out": torch.cat(out, dim=1), "keys": cache.k, "values": cache.v}


def assert_right(case: Case, run) -> None:
    fast = run(case, case.dtype, "triton")
    plain, exact = run(case, case.dtype, "reference"), run(case, torch.float64, "reference")
    for name in exact.keys() - {"d_scale"}:
        assert_as_accurate(fast[name], plain[name], exact[name], name)
    if "d_scale" in exact:
        # A sum over all tokens of terms of both signs: it is their size that rounding goes by, not the sum's.
        eps, terms = torch.finfo(case.dtype).eps, scale_gradient_terms(case).abs().sum((0, 1))
        errors = [(results["d_scale"] - exact["d_scale"]).abs() for results in (fast, plain)]
        assert (errors[0] <= 2 * (errors[1].max() + eps * terms.max())).all(), errors


def scale_gradient_terms(case: Case) -> Tensor:
    """``[B, L, H]``: what each token adds to the gradient of its head's scale, in float64."""
    q, k, v, scale = (tensor.detach() for tensor in case.tensors(torch.float64))
    q = (F.normalize(q, dim=-1) * scale.clamp(max=LN_100).exp()[:, None]).requires_grad_()
    factor = 1 if case.softmax_scale is None else case.softmax_scale
    out = scale_attention(q, F.normalize(k, dim=-1), v, case.schedule, softmax_scale=factor, backend="reference")
    return (torch.autograd.grad(out, q, weights(out))[0] * q.detach()).sum(-1)


def weights(out: Tensor) -> Tensor:
    """Gradients of a result."""
    return torch.linspace(-9, 9, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)


HALF = torch.float16
CASES = {
    "1": make(1, 64),
    "2 half": make(2, 32, HALF, lengths=(2,), cosine=False),
    "15": make(15, 64, HALF),
    "16": make(16, 32, batch=2),
    "17": make(17, 128, HALF, cosine=False),
    "31": make(31, 96),
    "33": make(33, 96, HALF),
    "63": make(63, 64, cosine=False, heads=1),
    "64": make(64, 64, HALF),
    "65": make(65, 32, HALF),
    "65 single": make(65, 64, seed=1, heads=1),
    "127": make(127, 96, HALF, heads=1),
    "128": make(128, 64, HALF, cosine=False, seed=2, heads=1),
    "129": make(129, 128, HALF, heads=1),
    "129 single": make(129, 32, seed=3, heads=1),
    "a cut scale": make(40, 32, lengths=(1, 4, 9, 100)),
    "many equal scales": make(36, 32, HALF, lengths=(3,) * 12),
    "one token each": make(18, 32, lengths=(1,) * 18, heads=1),
    "head_dim 40": make(20, 40, HALF),
    "negative": make(30, 32, softmax_scale=-0.7),
    "negative, plain": make(20, 64, HALF, cosine=False, softmax_scale=-0.2),
    "zero": make(20, 32, cosine=False, softmax_scale=0.0),
    "published": make(163, 64, HALF, lengths=ScaleSchedule.quadratic(16, 75).lengths, heads=1),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_training(case: Case):
    assert_right(case, training_step)


@every_case
def test_steps(case: Case, monkeypatch):
    """With as many processors as heads, a scale's keys are not split; with many more, as often as they can be."""
    assert_right(case, sampling)
    monkeypatch.setattr(backend, "_processors", lambda device: 1000)
    assert_right(case, sampling)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_largest_logits(dtype: torch.dtype):
    """Gains up to 100 and beyond. In fp32 the queries are almost their keys: weights are 0 and 1 but for little, and
    gradients small differences."""
    case = make(24, 32, dtype, heads=5)
    scale = torch.tensor([4.0, 4.5, LN_100, 5.0, 50.0])
    case = replace(case, q=case.k + 0.3 * case.q if dtype == torch.float32 else case.q, head_log_scale=scale)
    assert_right(case, training_step)
    assert_right(case, sampling)
    gradient = training_step(case, dtype, "triton")["d_scale"]
    assert (gradient[:3] != 0).all()  # also at the limit itself
    assert (gradient[3:] == 0).all()


def test_equal_keys():
    """Every row is the mean of the values it sees."""
    case = make(30, 32)
    case = replace(case, k=case.k[:, :1].expand_as(case.k))
    ends = torch.tensor([min(end, 30) for end in case.schedule.offsets[1:]])[case.schedule.scale_of_token()[:30]]
    means = (case.v.cumsum(1) / torch.arange(1, 31)[:, None, None])[:, ends - 1]
    torch.testing.assert_close(training_step(case, torch.float32, "triton")["out"].detach(), means)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_zero_rows(dtype: torch.dtype):
    """The normalisation of a row of zeros is zero."""
    case = make(20, 32, dtype)
    case.q[:, 3] = 0
    case.k[:, 5] = 0
    fast, exact = (sampling(case, d, name) for d, name in ((dtype, "triton"), (torch.float64, "reference")))
    torch.testing.assert_close(fast["out"].double(), exact["out"], rtol=5e-3, atol=5e-3)
    assert (fast["keys"][:, 5] == 0).all()
    for name, gradient in training_step(case, torch.float32, "triton").items():
        assert gradient.isfinite().all(), name


def test_strides(monkeypatch):
    """No layout is asked for; none is copied either, if channels lie side by side."""
    case = make(20, 32, batch=2)
    fused = torch.stack((case.q, case.k, case.v), dim=2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v)]
    channels_apart = [x.mT.contiguous().mT for x in (case.q, case.k, case.v)]
    expected = training_step(case, torch.float32, "triton")["out"]
    run = lambda q, k, v: scale_attention(  # noqa: E731
        q, k, v, case.schedule, head_log_scale=case.head_log_scale, backend="triton"
    )
    assert torch.equal(run(*channels_apart), expected)
    monkeypatch.setattr(Tensor, "contiguous", lambda *_: pytest.fail("copied"))
    assert torch.equal(run(*fused.unbind(2)), expected)
    assert torch.equal(run(*heads_first), expected)
    assert torch.equal(run(fused[:, :, 0], case.k, heads_first[2]), expected)


def test_strides_of_gradients():
    case = make(9, 32)
    q, k, v, scale = case.tensors(torch.float32)
    run = lambda grad: torch.autograd.grad(  # noqa: E731
        scale_attention(q, k, v, case.schedule, head_log_scale=scale, backend="triton"), (q, k, v, scale), grad
    )
    expanded = torch.ones(1).expand(q.shape)
    apart = torch.ones(q.shape).transpose(1, 2).contiguous().transpose(1, 2)
    for ours in (run(expanded), run(apart)):
        for a, b in zip(ours, run(torch.ones(q.shape)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_broken_token_is_not_seen_before_its_scale(which: str, value: float):
    case = make(40, 32, lengths=(1, 4, 9, 12, 14), cosine=False)
    sound = training_step(case, torch.float32, "triton")["out"]
    getattr(case, which)[0, 20, 1, 3] = value  # in the scale of tokens 14 to 25
    broken = training_step(case, torch.float32, "triton")["out"]
    hit = torch.zeros(40, dtype=torch.bool)
    hit[20 if which == "q" else slice(14, None)] = True
    assert torch.equal(broken[:, ~hit], sound[:, ~hit])
    assert torch.equal(broken[:, :, 0], sound[:, :, 0])
    if which != "k" or math.isnan(value):  # an infinite key may have the weight 0
        assert not broken[0, hit, 1].isfinite().all(dim=-1).any()


def test_a_result_does_not_depend_on_what_comes_later():
    """Bit for bit, but for the scale that is cut: a prefix of the tokens is computed alike."""
    case = make(100, 32, HALF, lengths=(1, 4, 9, 20, 30, 40))
    prefix = replace(case, q=case.q[:, :64], k=case.k[:, :64], v=case.v[:, :64])
    whole, part = (training_step(c, HALF, "triton")["out"] for c in (case, prefix))
    assert torch.equal(whole[:, :64], part)


def test_empty_batch():
    case = make(5, 32, batch=0)
    for result in (training_step(case, torch.float32, "triton"), sampling(case, torch.float32, "triton")):
        assert result["out"].shape == (0, 5, 2, 32)
    assert training_step(case, torch.float32, "triton")["d_scale"].tolist() == [0, 0]


def test_the_cache_is_known_to_change():
    case = make(5, 32)
    cache = ScaleCache.empty(1, 5, 2, 32)
    before = cache.k._version, cache.v._version
    scale_attention_step(case.q, case.k, case.v, cache, backend="triton")
    assert cache.k._version > before[0]
    assert cache.v._version > before[1]


def test_only_the_new_part_of_the_cache_is_written():
    case = make(20, 32)
    cache = ScaleCache.empty(1, 40, 2, 32)
    cache.k.fill_(7), cache.v.fill_(7)
    cache.length = 10
    scale_attention_step(case.q, case.k, case.v, cache, head_log_scale=case.head_log_scale, backend="triton")
    for kept in (cache.k, cache.v):
        assert (kept[:, :10] == 7).all()
        assert (kept[:, 30:] == 7).all()
        assert (kept[:, 10:30] != 7).all()


def test_how_keys_are_split(monkeypatch):
    monkeypatch.setattr(backend, "_processors", lambda device: 132)
    for keys in (1, 64, 65, 455, 4000):
        for programs in (0, 1, 16, 40, 132, 500):
            chunk, splits = backend._split(keys, 64, programs, torch.device("cpu"))
            assert chunk % 64 == 0
            assert (splits - 1) * chunk < keys <= splits * chunk  # none is without keys
            assert splits == 1 or splits * programs <= 132


def test_compiled():
    case = make(12, 32, HALF)
    q, k, v, scale = case.tensors(HALF)

    def run(q, k, v, scale):
        return scale_attention(q, k, v, case.schedule, head_log_scale=scale, backend="triton").float().square().sum()

    results = [
        torch.autograd.grad(function(q, k, v, scale), (q, k, v, scale))
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))
    ]
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("cosine", [False, True])
def test_opcheck(cosine: bool):
    case = make(6, 32, HALF, lengths=(1, 5), cosine=cosine)
    q, k, v, *scale = case.tensors(HALF)
    scale, rest = scale[0] if scale else None, ([1, 5], 0.5, "triton")
    torch.library.opcheck(torch.ops.aar_kernels.attention_forward, (q, k, v, scale, *rest))
    q, k, v, scale = (x if x is None else x.detach() for x in (q, k, v, scale))
    out, lse = torch.ops.aar_kernels.attention_forward(q, k, v, scale, *rest)
    torch.library.opcheck(torch.ops.aar_kernels.attention_backward, (q, q, k, v, scale, out, lse, *rest))
    caches = torch.zeros(2, 1, 9, 2, 32, dtype=HALF)
    torch.library.opcheck(torch.ops.aar_kernels.attention_step, (q, k, v, *caches.unbind(), scale, 2, 0.5, "triton"))


interpreter.isolate(globals())
