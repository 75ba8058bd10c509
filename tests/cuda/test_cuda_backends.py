"""Every backend on a GPU against the reference in float64 on the CPU. Skipped where there is no GPU.

``AAR_TEST_DEVICE=cpu`` runs the same on the CPU, to test these tests.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from cases import Case, as_dtype, assert_codes, make_case, near_ties
from helpers import assert_as_accurate, require
from torch import Tensor

from aar_kernels import ScaleSchedule, quantization
from aar_kernels.quantization import Levels

DEVICE = os.environ.get("AAR_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="of CUDA alone")
SEEDS = ["published", *range(42)]


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request) -> str:
    require("msrq_encode", request.param)
    if request.param == "native" and DEVICE == "cuda":
        from aar_kernels._library import library

        if library.cuda_reason is not None:
            pytest.skip(library.cuda_reason)
    return request.param


@pytest.fixture(autouse=True)
def _fill_empty(nan_filled_empty):
    pass


def on_device(case: Case) -> tuple[Levels, Tensor, Tensor | None]:
    levels = dataclasses.replace(
        case.levels, codebooks=case.levels.codebooks.to(DEVICE),
        phi_weights=[weight.to(DEVICE) for weight in case.levels.phi_weights],
        phi_biases=[bias.to(DEVICE) for bias in case.levels.phi_biases],
    )  # fmt: skip
    return levels, case.x.to(DEVICE), None if case.mask is None else case.mask.to(DEVICE)


def random_codes(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = len(case.x), case.levels.schedule.total
    codes = torch.randint(case.levels.codebook_size, shape, generator=generator)
    return codes.masked_fill(torch.rand(shape, generator=generator) < 0.1, -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_encode(backend, seed):
    case = make_case(seed)
    levels, x, mask = on_device(case)
    assert_codes(quantization.encode(x, levels, mask=mask, backend=backend).cpu(), case)


@pytest.mark.parametrize("batch", [1, 2, 5, 20, 300, 600])
def test_encode_of_the_published_sizes_at_every_kind_of_plan(backend, batch):
    """From clusters of 16 blocks for an item to groups of items for a block."""
    case = make_case("published")
    x = torch.randn(batch, 75, 64, generator=torch.Generator().manual_seed(batch)).mT
    case = Case(case.levels, x, None)
    levels, x, _ = on_device(case)
    assert_codes(quantization.encode(x, levels, backend=backend).cpu(), case)


@pytest.mark.parametrize("length", [700, 6000])
def test_encode_of_long_sequences(backend, length):
    """Chunks of rows; and residuals that no shared memory holds."""
    generator = torch.Generator().manual_seed(length)
    levels = Levels(ScaleSchedule([1, 7, length // 3, length]), torch.randn(4, 100, 128, generator=generator))
    case = Case(levels, torch.randn(1, length, 128, generator=generator).mT, None)
    levels, x, _ = on_device(case)
    assert_codes(quantization.encode(x, levels, backend=backend).cpu(), case)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rows_between_two_codes(backend, metric):
    case = near_ties(metric)
    levels, x, _ = on_device(case)
    assert_codes(quantization.encode(x, levels, backend=backend).cpu(), case)


@pytest.mark.parametrize("name", ["decode", "decode_scales", "next_scale_inputs"])
@pytest.mark.parametrize("seed", SEEDS)
def test_decode(backend, seed, name):
    case = make_case(seed)
    codes, double, (levels, _, _) = random_codes(case), as_dtype(case.levels, torch.float64), on_device(case)
    function = getattr(quantization, name)
    ours = function(codes.to(DEVICE), levels, length=case.length, backend=backend)
    plain = function(codes, case.levels, length=case.length, backend="reference")
    exact = function(codes, double, length=case.length, backend="reference")
    assert_as_accurate(ours.cpu(), plain, exact)


@pytest.mark.parametrize("seed", SEEDS)
def test_step(backend, seed):
    case = make_case(seed)
    double, (levels, _, _), f_hat = as_dtype(case.levels, torch.float64), on_device(case), case.x.mT
    for s, codes in enumerate(random_codes(case).split(list(case.levels.schedule.lengths), dim=1)):
        ours = quantization.step(s, f_hat.to(DEVICE), codes.to(DEVICE), levels, backend=backend)
        plain = quantization.step(s, f_hat, codes, case.levels, backend="reference")
        exact = quantization.step(s, f_hat.double(), codes, double, backend="reference")
        assert_as_accurate(ours[0].cpu(), plain[0], exact[0], f"f_hat after scale {s}")
        assert_as_accurate(ours[1].cpu(), plain[1], exact[1], f"input of scale {s + 1}")


def test_results_do_not_vary(backend):
    case = make_case("published")
    levels, x, _ = on_device(case)
    codes = quantization.encode(x, levels, backend=backend)
    decoded = quantization.decode(codes, levels, backend=backend)
    for _ in range(20):
        assert torch.equal(quantization.encode(x, levels, backend=backend), codes)
        assert torch.equal(quantization.decode(codes, levels, backend=backend), decoded)


def test_a_changed_weight_is_never_served_stale(backend):
    case = make_case(0, sharing="partial", kind="multiscale", masked="absent", batch=4, latent=16)
    levels, x, _ = on_device(case)
    for weight in (levels.codebooks, levels.phi_weights[0], levels.phi_biases[0]):
        quantization.decode(quantization.encode(x, levels, backend=backend), levels, backend=backend)
        weight.mul_(-1.5)
        codes = quantization.encode(x, levels, backend=backend)
        fresh = as_dtype(levels, torch.float32)
        assert torch.equal(codes, quantization.encode(x, fresh, backend=backend))
        decoded = quantization.decode(codes, levels, backend=backend)
        assert torch.equal(decoded, quantization.decode(codes, fresh, backend=backend))


@needs_cuda
def test_a_captured_graph_replays_on_new_input_and_another_stream(backend):
    case = make_case("published")
    levels, x, _ = on_device(case)

    def run() -> Tensor:
        return quantization.decode(quantization.encode(x, levels, backend=backend), levels, backend=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(captured, run())


@needs_cuda
@pytest.mark.parametrize("code", [-2, 1024])
def test_a_code_out_of_range_is_a_device_side_assertion(backend, code):
    """In a process of its own, since no other call works after one."""
    script = f"""
import torch
from aar_kernels import ScaleSchedule, quantization
levels = quantization.Levels(ScaleSchedule([3]), torch.zeros(1, 1024, 8, device="cuda"))
try:
    quantization.decode(torch.full((1, 3), {code}, device="cuda"), levels, backend={backend!r})
    torch.cuda.synchronize()
except RuntimeError as error:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr[-2000:]


@needs_cuda
def test_what_native_refuses():
    from aar_kernels import dispatch
    from aar_kernels.quantization import native_cuda

    def reason(**problem) -> str | None:
        usual = {"operator": "msrq_encode", "device": "cuda", "dtype": torch.float32, "dim": 64}
        return native_cuda.unsupported(dispatch.Problem(**usual | problem))

    assert "float32" in reason(dtype=torch.float64)
    assert "not differentiable" in reason(needs_grad=True)
    assert "at most 128 channels" in reason(dim=129)
    assert "inference only" in reason(operator="msrq_quantize")
