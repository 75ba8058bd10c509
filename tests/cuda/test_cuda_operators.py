"""The operators but the quantizer's inference, compiled by Triton on a GPU, against the reference on the CPU.

Skipped where there is no GPU; the interpreter's tests do the same without one. ``AAR_TEST_DEVICE=cpu`` runs the native
backend on the CPU instead, to test these tests.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from helpers import assert_as_accurate, error64
from torch import Tensor

import aar_kernels as ak
from aar_kernels import sampling, seanet
from aar_kernels.attention import ScaleCache, scale_attention, scale_attention_step
from aar_kernels.modulation import gated_residual_modulate, layer_norm_modulate
from aar_kernels.seanet import Conv, ConvTranspose, Residual

DEVICE = os.environ.get("AAR_TEST_DEVICE", "cuda")
BACKEND = "triton" if DEVICE == "cuda" else "native"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEDULE = ak.ScaleSchedule.quadratic(16, 75)
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def results(function, tensors: list[Tensor], device: str, backend: str) -> list[Tensor]:
    """What ``function(backend, *tensors)`` gives, and the gradients of all tensors by random sums of it, on the CPU."""
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
    outputs = function(backend, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [draw(*out.shape, seed=1).to(out.dtype).to(device) for out in outputs]
    return [t.detach().cpu() for t in (*outputs, *torch.autograd.grad(outputs, leaves, weights))]


def check(function, tensors: list[Tensor]) -> None:
    """In the dtypes of ``tensors``: as accurate as the reference in them, and the same twice."""
    found = results(function, tensors, DEVICE, BACKEND)
    plain = results(function, tensors, "cpu", "reference")
    exact = results(function, [tensor.double() for tensor in tensors], "cpu", "reference")
    for i, (one, other, best) in enumerate(zip(found, plain, exact, strict=True)):
        if best.numel() > 16:
            assert_as_accurate(one, other, best, f"result {i}")
        else:  # long sums, of which the reference's few may be right by luck
            bound = 2 * error64(other, best) + 256 * torch.finfo(one.dtype).eps * best.abs().max().item()
            assert error64(one, best) <= bound, f"result {i}"
    for one, other in zip(found[:1], results(function, tensors, DEVICE, BACKEND)[:1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 72, 128])
@pytest.mark.parametrize("cosine", [True, False])
def test_attention(cosine, dim, dtype):
    def run(backend, q, k, v, scale=None):
        return scale_attention(q, k, v, SCHEDULE, head_log_scale=scale, backend=backend)

    qkv = list(draw(3, 2, SCHEDULE.total, 4, dim).to(dtype).unbind())
    check(run, [*qkv, torch.linspace(0, 3, 4)] if cosine else qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 16])
def test_attention_step_by_step(batch, dtype):
    q, k, v = draw(3, batch, SCHEDULE.total, 4, 64).to(dtype).unbind()
    scale = torch.linspace(0, 3, 4)
    cache = ScaleCache.empty(batch, SCHEDULE.total, 4, 64, dtype=dtype, device=DEVICE)
    steps = [
        scale_attention_step(
            *(t[:, part].to(DEVICE) for t in (q, k, v)), cache, head_log_scale=scale.to(DEVICE), backend=BACKEND
        )
        for part in SCHEDULE.slices()
    ]
    plain = scale_attention(q, k, v, SCHEDULE, head_log_scale=scale, backend="reference")
    exact = [tensor.double() for tensor in (q, k, v)]
    exact = scale_attention(*exact, SCHEDULE, head_log_scale=scale.double(), backend="reference")
    assert_as_accurate(torch.cat(steps, 1).cpu(), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [100, 1024, 1100])
@pytest.mark.parametrize("batch", [1, 9])
def test_modulation(batch, channels, dtype):
    x, y = (draw(batch, 75, channels, seed=seed).to(dtype) for seed in (0, 1))
    gate, scale, shift = (draw(batch, channels, seed=seed).to(dtype) for seed in (2, 3, 4))

    def gated(backend, x, y, gate, scale, shift):
        return gated_residual_modulate(x, y, gate, scale, shift, backend=backend)

    def plain(backend, x, scale, shift):
        return layer_norm_modulate(x, scale, shift, backend=backend)

    check(gated, [x, y, gate, scale, shift])
    check(plain, [x, scale, shift])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [100, 1024, 4096])
def test_sampling(vocabulary, dtype):
    """The same codes as on the CPU, from any settings."""
    logits, uncond = draw(2, 64, 75, vocabulary).to(dtype).unbind()
    seeds = torch.arange(64)
    for settings in ({}, {"top_k": 20}, {"top_p": 0.9, "temperature": 0.7}, {"top_k": 200, "top_p": 0.95}):
        settings |= {"guidance": 3.0}
        expected = sampling.sample(logits, uncond=uncond, seeds=seeds, backend="reference", **settings)
        on_device = [tensor.to(DEVICE) for tensor in (logits, uncond, seeds)]
        codes = sampling.sample(on_device[0], uncond=on_device[1], seeds=on_device[2], backend=BACKEND, **settings)
        assert torch.equal(codes.cpu(), expected), settings


def convolutions(width: int) -> list:
    """An encoder's part and a decoder's, as SAT has them: every kind of layer."""
    half = width // 2
    narrow, shortcut = Conv(draw(width, half, 1) / half**0.5, draw(width)), Conv(draw(width, width, 1) / width**0.5)
    residual = Residual(Conv(draw(half, width, 3) / (3 * width) ** 0.5, draw(half)), narrow, shortcut)
    down = Conv(draw(2 * width, width, 8) / (8 * width) ** 0.5, draw(2 * width), stride=4, elu=True)
    up = ConvTranspose(draw(2 * width, width, 8) / (4 * width) ** 0.5, draw(width), stride=4, elu=True)
    first, last = Conv(draw(width, 1, 7), draw(width)), Conv(draw(1, width, 7) / width, elu=True)
    return [first, residual, down, up, residual, last]


@pytest.mark.parametrize("width", [16, 32, 128])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_seanet(width, weights):
    layers, x = convolutions(width), draw(3, 1, 4801)
    packed = seanet.pack(layers, dtype=weights)
    wide = packed._replace(weights=packed.weights.double())
    on_device = packed._replace(weights=packed.weights.to(DEVICE))
    found = seanet.stack(x.to(DEVICE), on_device, backend=BACKEND)
    plain = seanet.stack(x, packed, backend="reference")
    assert_as_accurate(found.cpu(), plain, seanet.stack(x.double(), wide, backend="reference"))


@pytest.mark.parametrize("batch", [1, 5])
def test_seanet_lstm(batch):
    module = torch.nn.LSTM(128, 128, 2).requires_grad_(False)
    packed, x = seanet.pack_lstm(seanet.LSTM(module.all_weights)), draw(batch, 128, 75)
    found = seanet.lstm(x.to(DEVICE), packed._replace(weights=packed.weights.to(DEVICE)), backend=BACKEND)
    plain = seanet.lstm(x, packed, backend="reference")
    exact = seanet.lstm(x.double(), packed._replace(weights=packed.weights.double()), backend="reference")
    assert error64(found.cpu(), exact) <= 4 * error64(plain, exact) + 1e-6


@pytest.mark.parametrize("batch", [2, 40])
def test_training_of_the_quantizer(batch):
    """Result, loss and gradient where codes agree, as all but ties do; and the same codebooks afterwards."""
    torch.manual_seed(0)
    options = {"latent_dim": 64, "kmeans_init": False, "dead_code_threshold": 0.0}
    plain = ak.nn.MultiScaleResidualQuantizer(128, schedule=SCHEDULE, **options)
    plain.codebooks.copy_(draw(*plain.codebooks.shape))
    ours = copy.deepcopy(plain).to(DEVICE)
    found = []
    for module, device, backend in ((ours, DEVICE, BACKEND), (plain, "cpu", "reference")):
        x = draw(batch, 128, 75).to(device).requires_grad_()
        with ak.use_backend(backend):
            quantized, codes, loss = module.train()(x)
            (quantized.square().mean() + loss).backward()
        found.append([codes.cpu(), quantized.detach().cpu(), x.grad.cpu()])
    (codes, *ours_found), (expected, *plain_found) = found
    same = (codes == expected).all(1)
    assert same.float().mean() > 0.5
    for a, b in zip(ours_found, plain_found, strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=1e-4, atol=1e-4 * b.abs().max().item())
    if same.all():
        torch.testing.assert_close(ours.codebooks.cpu(), plain.codebooks, rtol=1e-4, atol=1e-4)
