"""The CUDA kernels, thread by thread on the CPU, against the reference in float64.

csrc/cuda/emulate.h runs the kernels' own code: clusters and what they exchange, the operands of the tensor core, the
screening bound and the search among what it leaves. Blocks are planned for GPUs of several sizes, so that small cases
meet every split. What a GPU does in parallel happens here in an order drawn from a seed.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from cases import Case, as_dtype, assert_codes, make_case, near_ties
from emulated import Device
from helpers import assert_as_accurate

from aar_kernels import ScaleSchedule, quantization
from aar_kernels.quantization import Levels, native_cuda

H100, A100 = Device(), Device(processors=108, shared=163 << 10, cluster=1)
# Few multiprocessors: then items come in groups, blocks go on to further groups, and chunks are small.
DEVICES = {
    "cluster of 16": H100,
    "one block an item": A100,
    "cluster of 4, chunks of 16": Device(processors=4, cluster=4, chunk=16),
    "groups": Device(processors=1, cluster=1),
    "residual in device memory": Device(processors=4, shared=0, cluster=2, chunk=32),  # the emulation has room anyway
}
SEEDS = [1, 2, 3, 6, 7, 12, 14, 17, 18, 23, 26, 28, 33, 36, 41]  # every latent, schedule, mask and metric; few codes


def random_codes(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = len(case.x), case.levels.schedule.total
    codes = torch.randint(case.levels.codebook_size, shape, generator=generator)
    return codes.masked_fill(torch.rand(shape, generator=generator) < 0.1, -1)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
def test_encode(seed, device):
    if device is H100 and seed in (2, 14, 26, 33, 41):
        pytest.skip("many items in a cluster each take long")
    case = make_case(seed)
    assert_codes(emulated.encode(case.x, case.levels, device, case.mask, seed), case)


def test_encode_of_the_published_sizes():
    case = make_case("published")
    case = Case(case.levels, case.x[:1], None)
    assert_codes(emulated.encode(case.x, case.levels, dataclasses.replace(H100, processors=2)), case)


@pytest.mark.parametrize("holes", [False, True])
def test_encode_of_more_frames_and_tokens_than_are_handled_at_once(holes):
    """Chunks of rows, some without a code where the mask has holes; and more frames of a block than get positions."""
    generator = torch.Generator().manual_seed(0)
    levels = Levels(ScaleSchedule([1, 40, 150, 290]), torch.randn(4, 20, 16, generator=generator))
    mask = torch.arange(290)[None] // 20 % 2 == 0 if holes else None
    case = Case(levels, torch.randn(1, 290, 16, generator=generator).mT, mask)
    for device in (A100, dataclasses.replace(DEVICES["cluster of 4, chunks of 16"], processors=2)):
        assert_codes(emulated.encode(case.x, case.levels, device, case.mask), case)


@pytest.mark.parametrize("seed", [0, 6, 17])
def test_neither_the_plan_nor_the_order_of_threads_changes_a_code(seed):
    """All sums have a fixed order. A barrier too few would show here: threads come in another order each time."""
    case = make_case(seed, batch=2, size=100)
    first = emulated.encode(case.x, case.levels, A100, case.mask)
    for order, device in enumerate([A100, A100, *DEVICES.values()], start=1):
        assert torch.equal(emulated.encode(case.x, case.levels, device, case.mask, order), first), device


@pytest.mark.parametrize("device", [A100, dataclasses.replace(H100, processors=2)], ids=["block", "cluster"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rows_between_two_codes(metric, device):
    """bf16 cannot tell these codes apart, and float32 often errs."""
    case = near_ties(metric)
    assert_codes(emulated.encode(case.x, case.levels, device), case)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("size", [7, 100])
def test_the_first_of_equal_codes_wins(size, metric):
    """Each code is there three times: in a cluster, in other blocks' shares of the codebook too."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(size, 24, generator=generator)
    orders = [torch.arange(size), torch.randperm(size, generator=generator), torch.arange(size).flip(0)]
    levels = Levels(ScaleSchedule([20]), torch.cat([distinct[order] for order in orders])[None], metric=metric)
    x = torch.randn(2, 24, 20, generator=generator)
    for device in (A100, H100):
        assert (emulated.encode(x, levels, device) < size).all()


def test_more_candidates_than_there_is_room_for():
    """Codes so alike that screening keeps them all: every code of the rows without room is compared in double."""
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(1, 1, 16, generator=generator) + 1e-5 * torch.randn(1, 3000, 16, generator=generator)
    case = Case(Levels(ScaleSchedule([3]), books), torch.randn(1, 16, 3, generator=generator), None)
    for device in (A100, dataclasses.replace(H100, processors=2)):
        assert_codes(emulated.encode(case.x, case.levels, device), case)


@pytest.mark.parametrize(
    ("metric", "scale"), [("euclidean", s) for s in (1e-30, 1e-18, 1e18, 1e30)] + [("cosine", s) for s in (1e18, 1e30)]
)
def test_rows_whose_squares_leave_the_range_of_float32(metric, scale):
    """The bound takes underflow into account, and a row too large for it is compared with every code in double."""
    case = make_case(0, metric=metric, batch=1, size=32, latent=16, kind="one scale", sharing="absent", masked="absent")
    levels = dataclasses.replace(case.levels, codebooks=case.levels.codebooks * (scale if metric == "euclidean" else 1))
    x = case.x * scale
    expected = quantization.encode(x.double(), as_dtype(levels, torch.float64), backend="reference")
    for device in (A100, H100):
        assert torch.equal(emulated.encode(x, levels, device), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_item_with_a_nan_or_an_inf_has_no_codes(value):
    case = make_case(0, batch=3, size=32, latent=16, kind="multiscale", masked="absent")
    x = case.x.clone()
    x[1, 5, -1] = value
    for order, device in enumerate((A100, A100, Device(processors=12, cluster=4), Device(processors=12, cluster=4))):
        codes = emulated.encode(x, case.levels, device, seed=order)
        assert (codes[1] == -1).all()
        assert_codes(codes[[0, 2]], Case(case.levels, x[[0, 2]], None))


def test_a_codebook_with_nan_gives_codes_within_range():
    case = make_case(0, batch=1, size=32, latent=16, kind="one scale", sharing="absent", masked="absent")
    books = case.levels.codebooks.clone()
    books[:, 3, 5] = torch.nan
    for holes in (books, torch.full_like(books, torch.nan)):
        codes = emulated.encode(case.x, dataclasses.replace(case.levels, codebooks=holes), A100)
        assert ((codes >= 0) & (codes < 32)).all()


@pytest.mark.parametrize("seed", [*SEEDS, 0])
def test_decode(seed):
    """decode, decode_scales and next_scale_inputs are one kernel; step is the same, begun in the middle."""
    case = make_case(seed)
    codes, double, scales = random_codes(case), as_dtype(case.levels, torch.float64), case.levels.schedule.num_scales
    f_hat, each, pooled = emulated.decode(codes, case.levels, case.length, 0, scales, seed=seed)
    for name, ours in (("decode", f_hat.mT), ("decode_scales", each.mT), ("next_scale_inputs", pooled)):
        function = getattr(quantization, name)
        plain = function(codes, case.levels, length=case.length, backend="reference")
        exact = function(codes, double, length=case.length, backend="reference")
        assert_as_accurate(ours, plain, exact, name)

    base = case.rows(torch.float32).contiguous()
    for s, part in enumerate(codes.split(list(case.levels.schedule.lengths), dim=1)):
        f_hat, _, pooled = emulated.decode(part, case.levels, case.length, s, s + 1, base, seed)
        plain = quantization.step(s, base, part, case.levels, backend="reference")
        exact = quantization.step(s, base.double(), part, double, backend="reference")
        assert_as_accurate(f_hat, plain[0], exact[0], f"f_hat after scale {s}")
        assert_as_accurate(pooled, plain[1], exact[1], f"input of scale {s + 1}")


def test_decode_of_sums_that_do_not_fit_in_shared_memory():
    levels = make_case(0, latent=3, size=7, kind="multiscale").levels
    codes = torch.randint(7, (1, levels.schedule.total), generator=torch.Generator().manual_seed(0))
    _, _, pooled = emulated.decode(codes, levels, 1100, 0, levels.schedule.num_scales)
    plain = quantization.next_scale_inputs(codes, levels, length=1100, backend="reference")
    exact = quantization.next_scale_inputs(codes, as_dtype(levels, torch.float64), length=1100, backend="reference")
    assert_as_accurate(pooled, plain, exact)


@pytest.mark.parametrize("device", [H100, A100, Device(processors=84, shared=99 << 10, cluster=1)])
@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("length", [1, 75, 1500, 9000])
def test_plans(length, dim, device):
    """Every plan covers the batch and keeps to the device's memory."""
    for batch in (1, 3, 33, 300, 5000):
        plan = emulated.plan(batch, length, dim, 1024, 9, [1, 2, length], device)
        assert plan["shared"] <= device.shared
        assert plan["cluster"] * plan["frames"] >= length
        assert plan["cluster"] <= device.cluster
        assert 0 < plan["clusters"] * plan["group"] < batch + plan["group"]
        assert plan["chunk"] % 16 == 0
        assert 0 < plan["chunk"] <= device.chunk


def test_plans_of_the_published_sizes_on_hopper():
    lengths = list(ScaleSchedule.quadratic(16, 75).lengths)
    one = emulated.plan(1, 75, 64, 1024, 9, lengths, H100)
    assert (one["cluster"], one["clusters"], one["workspace"]) == (16, 1, 0)
    many = emulated.plan(1024, 75, 64, 1024, 9, lengths, H100)
    assert (many["cluster"], many["workspace"]) == (1, 0)
    assert many["clusters"] == 2 * H100.processors  # two blocks fit in a multiprocessor


def test_packing_puts_each_channel_where_the_tensor_core_expects_it():
    """The product of two fragments, taken apart by hand."""
    books = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(0))
    fragments, half_squares, exact, bound = native_cuda.pack(books, "euclidean")
    assert fragments.shape == (1, 8, 1, 8, 4, 2, 4)
    assert torch.equal(exact[..., :24], books)
    assert not exact[..., 24:].any()
    for code, channel in ((0, 0), (9, 7), (39, 23), (17, 16)):
        step, quarter, at = channel // 16, channel % 16 // 4, channel % 4
        assert fragments[0, code // 8, 0, code % 8, quarter, step, at] == books[0, code, channel].bfloat16()
    assert not fragments[0, 5].any()  # padding
    assert half_squares[0, 40:].isinf().all()
    error = (books - books.bfloat16().float()).norm(dim=-1).max()
    assert (bound[0] >= torch.stack([books.norm(dim=-1).max(), error, half_squares[0, :40].max()])).all()


def test_sanitizers(tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing: shared memory is exactly as large as was asked."""
    if os.environ.get("AAR_CUDA_MODEL"):
        pytest.skip("runs already with a library of its own")
    model = emulated.compile_model(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = subprocess.run([*emulated.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(done.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("the compiler has no libasan.so")
    here = Path(__file__)
    paths = [str(path) for path in (here.parent, here.parents[1], here.parents[1] / "quantization", here.parents[2])]
    script = (
        "import emulated, test_cuda_model as t\n"
        "for seed, device in zip((3, 7, 12, 18, 1), t.DEVICES.values(), strict=True):\n"
        "    t.test_encode(seed, device)\n"
        "    t.test_decode(seed)\n"
        "print('clean')\n"
    )
    environment = os.environ | {
        "AAR_CUDA_MODEL": str(model), "LD_PRELOAD": str(runtime.resolve()), "PYTHONPATH": os.pathsep.join(paths),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("clean\n")
