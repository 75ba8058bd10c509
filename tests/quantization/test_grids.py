"""Quantizers whose scales are grids: every backend against the reference in float64, and that against loops."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import require
from native_levels import LEVELS, check_level, check_sanitized
from quantization.cases import as_dtype, assert_codes, assert_decoding, assert_steps
from quantization.grid_cases import make_grid_case, random_grid_codes

from aar_kernels import GridSchedule, ScaleSchedule, quantization, use_backend
from aar_kernels.dispatch import Problem
from aar_kernels.nn import MultiScaleResidualQuantizer
from aar_kernels.quantization import Levels, native_cuda, reference, residual_phi

SEEDS = ["VAR", *range(30)]
DECODERS = ["decode", "decode_scales", "next_scale_inputs"]
SCRIPT = Path(__file__).parent / "grid_equality.py"


@pytest.mark.parametrize("seed", SEEDS)
def test_encode(backend, seed):
    case = make_grid_case(seed)
    assert_codes(quantization.encode(case.x, case.levels, backend=backend), case)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_decode(fast, seed, name):
    case = make_grid_case(seed)
    assert_decoding(random_grid_codes(case), case, name, fast)


@pytest.mark.parametrize("seed", SEEDS)
def test_step(fast, seed):
    case = make_grid_case(seed)
    assert_steps(random_grid_codes(case), case, fast)


@pytest.mark.parametrize("seed", [0, 2, 4, 8])
def test_the_reference_is_its_equations(seed):
    """Codes and contributions by loops over windows, Keys' kernel and taps, in float64."""
    case = make_grid_case(seed, batch=1)
    levels = as_dtype(case.levels, torch.float64)
    residual, found = case.x[0].double(), []
    height, width = levels.schedule.grid
    for s, (h, w) in enumerate(levels.schedule.grids):
        rows = torch.stack([
            residual[:, _window(i, h, height), _window(j, w, width)].mean(dim=(1, 2))
            for i in range(h)
            for j in range(w)
        ])  # fmt: skip
        book = levels.codebooks[s if len(levels.codebooks) > 1 else 0]
        if levels.metric == "cosine":
            found.append((F.normalize(rows) @ F.normalize(book).T).argmax(1))
        else:
            found.append(torch.cdist(rows, book, compute_mode="donot_use_mm_for_euclid_dist").argmin(1))
        up = torch.einsum("yi,ijd,xj->dyx", _cubic(h, height), book[found[-1]].view(h, w, -1), _cubic(w, width))
        if levels.phi_weights:
            weight, bias = (part[levels.phi_index[s]] for part in (levels.phi_weights, levels.phi_biases))
            side = weight.shape[-1]
            padded = F.pad(up, (side // 2,) * 4)
            conv = bias[:, None, None].expand_as(up).clone()
            for dy in range(side):
                for dx in range(side):
                    shifted = padded[:, dy : dy + height, dx : dx + width]
                    conv += torch.einsum("oi,iyx->oyx", weight[:, :, dy, dx], shifted)
            up = (up + conv) / 2
        residual = residual - up
    assert torch.equal(quantization.encode(case.x.double(), levels), torch.cat(found)[None])
    decoded = quantization.decode(torch.cat(found)[None], levels)[0]
    torch.testing.assert_close(decoded, case.x[0].double() - residual)


def _window(i: int, n: int, length: int) -> slice:
    return slice(i * length // n, -(-(i + 1) * length // n))


def _cubic(n: int, length: int, a: float = -0.75) -> torch.Tensor:
    """``[length, n]``: the weight of each row at each position."""
    weights = torch.zeros(length, n, dtype=torch.float64)
    for t in range(length):
        x = (t + 0.5) * n / length - 0.5
        for i in range(int(x // 1) - 1, int(x // 1) + 3):
            d = abs(x - i)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[t, min(max(i, 0), n - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return weights


@pytest.mark.parametrize("seed", [0, 3, 5, 9, "VAR"])
def test_steps_are_next_scale_inputs_one_at_a_time(fast, seed):
    case = make_grid_case(seed, batch=3)
    levels = case.levels
    codes, f_hat, inputs = quantization.encode(case.x, levels, backend=fast), torch.zeros_like(case.x), []
    scales, f_hat = quantization.decode_scales(codes, levels, backend=fast), f_hat.flatten(2).mT
    for s, part in enumerate(codes.split(list(levels.schedule.lengths), dim=1)):
        f_hat, following = quantization.step(s, f_hat, part, levels, backend=fast)
        assert torch.equal(f_hat, scales[s].flatten(2).mT)
        inputs.append(following)
    assert torch.equal(quantization.next_scale_inputs(codes, levels, backend=fast), torch.cat(inputs, dim=1))
    assert torch.equal(quantization.decode(codes, levels, backend=fast), scales[-1])


@pytest.mark.parametrize("seed", [0, 3, 8, "VAR"])
def test_items_of_a_batch_do_not_meet(fast, seed):
    case = make_grid_case(seed, batch=9)
    codes = quantization.encode(case.x, case.levels, backend=fast)
    decoded = quantization.decode(codes, case.levels, backend=fast)
    for b in range(0, 9, 4):
        item = slice(b, b + 1)
        assert torch.equal(quantization.encode(case.x[item], case.levels, backend=fast), codes[item])
        assert torch.equal(quantization.decode(codes[item], case.levels, backend=fast), decoded[item])


@pytest.mark.parametrize("seed", [1, 3, "VAR"])
def test_results_do_not_depend_on_the_number_of_threads(fast, seed):
    """A single item is shared by the threads, line by line and within a line."""
    case, results, before = make_grid_case(seed, batch=1), [], torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        codes = quantization.encode(case.x, case.levels, backend=fast)
        results.append([codes, quantization.decode(codes, case.levels, backend=fast)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True))


def test_one_line_of_cells_is_not_a_sequence(backend):
    """Both are pooled alike, but images are interpolated by cubics: they agree where nothing is interpolated."""
    generator = torch.Generator().manual_seed(0)
    books, x = torch.randn(3, 20, 6, generator=generator), torch.randn(2, 6, 1, 9, generator=generator)
    weight, bias = torch.randn(6, 6, 3, 3, generator=generator) / 8, torch.randn(6, generator=generator)
    for n in (9, 4):
        grids = Levels(GridSchedule([(1, n), (1, 9), (1, 9)]), books, [weight], [bias], (0, 0, 0))
        line = Levels(ScaleSchedule([n, 9, 9]), books, [weight[:, :, 1]], [bias], (0, 0, 0))
        codes = quantization.encode(x[:, :, 0], line, backend=backend)
        if n == 9:
            assert torch.equal(quantization.encode(x, grids, backend=backend), codes)
        decoded = quantization.decode(codes, line, backend=backend)
        near = torch.allclose(quantization.decode(codes, grids, backend=backend)[:, :, 0], decoded, atol=1e-5)
        assert near == (n == 9)


@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.0, 1.0])
def test_phi_of_another_ratio(ratio):
    generator = torch.Generator().manual_seed(0)
    for axes in (1, 2):
        u = torch.randn(2, 5, *[7] * axes, generator=generator)
        weight, bias = torch.randn(5, 5, *[3] * axes, generator=generator), torch.randn(5, generator=generator)
        convolution = F.conv1d if axes == 1 else F.conv2d
        ours, offset = residual_phi(weight, bias, ratio)
        expected = (1 - ratio) * u + ratio * convolution(u, weight, bias, padding=1)
        torch.testing.assert_close(0.5 * u + 0.5 * convolution(u, ours, offset, padding=1), expected)


# ------------------------------------------------------------------------------------------------------
# PyTorch


@pytest.mark.parametrize("name", [*DECODERS, "step"])
def test_gradcheck(name):
    """By codebooks and phi, in float64."""
    case = make_grid_case(2, latent=3, size=7, batch=2, widths=(3, 1))
    levels, codes = as_dtype(case.levels, torch.float64), random_grid_codes(case)
    f_hat = case.rows(torch.float64).requires_grad_()

    def run(f_hat, codebooks, *phi):
        given = dataclasses.replace(levels, codebooks=codebooks, phi_weights=phi[:2], phi_biases=phi[2:])
        if name == "step":
            return quantization.step(0, f_hat, codes[:, : levels.schedule.lengths[0]], given)
        return getattr(quantization, name)(codes, given)

    torch.autograd.gradcheck(run, [f_hat, *(w.requires_grad_() for w in levels.weights)], fast_mode=True)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", ["encode", *DECODERS, "step"])
def test_opcheck(fast, name, seed):
    case = make_grid_case(seed, batch=2, latent=8, size=32)
    rows, codes, levels = case.rows(torch.float32).contiguous(), random_grid_codes(case), case.levels.arguments()
    arguments = {
        "encode": (rows, None, *levels, fast),
        "step": (rows, codes[:, : levels[3][0]].contiguous(), *levels, 0, fast),
    }.get(name, (codes, *levels, rows.shape[1], fast))
    torch.library.opcheck(getattr(torch.ops.aar_kernels, f"msrq_{name}").default, arguments)


@torch.no_grad()
def test_compiled(backend):
    case = make_grid_case(0, batch=2)
    levels, first = case.levels, case.levels.schedule.lengths[0]

    def everything(x, f_hat):
        codes = quantization.encode(x, levels)
        results = [getattr(quantization, name)(codes, levels) for name in DECODERS]
        return codes, *results, *quantization.step(0, f_hat, codes[:, :first], levels)

    torch.compiler.reset()
    inputs = case.x, case.rows(torch.float32)
    with use_backend(backend):
        expected = everything(*inputs)
        run = torch.compile(everything, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(run(*inputs), expected, strict=True):
            torch.testing.assert_close(ours, eager)
    torch.compiler.reset()


def test_any_memory_layout_and_dtype(backend):
    case = make_grid_case(3, batch=4)
    codes = quantization.encode(case.x, case.levels, backend=backend)
    for x in (case.x.contiguous(memory_format=torch.channels_last), case.x.mT.contiguous().mT):
        assert torch.equal(quantization.encode(x, case.levels, backend=backend), codes)
    half = case.x.bfloat16()
    codes = quantization.encode(half, case.levels, backend=backend)
    assert torch.equal(codes, quantization.encode(half.float(), case.levels, backend=backend))


@torch.no_grad()
def test_a_changed_weight_is_seen(fast):
    case = make_grid_case("VAR", size=50, batch=1)
    levels = as_dtype(case.levels, torch.float32)
    codes = quantization.encode(case.x, levels, backend=fast)
    before = quantization.decode(codes, levels, backend=fast)
    for weight in levels.weights:
        weight.neg_()
        decoded = quantization.decode(codes, levels, backend=fast)
        fresh = quantization.decode(codes, as_dtype(levels, torch.float32), backend=fast)
        assert torch.equal(decoded, fresh)
        assert not torch.equal(decoded, before)
        before = decoded


# ------------------------------------------------------------------------------------------------------
# input


def test_wrong_input(backend):
    case = make_grid_case(3, batch=2, widths=(3,))
    x, levels, codes = case.x, case.levels, random_grid_codes(case)
    for wrong in (x[0], x[:, 1:], x[..., 1:], x.flatten(2), x[:, :, 1:]):
        with pytest.raises(ValueError, match=r"x must be \[batch, 16, \d+, \d+\], got"):
            quantization.encode(wrong, levels, backend=backend)
    with pytest.raises(ValueError, match="mask is for sequences"):
        quantization.encode(x, levels, mask=x[:, 0] > 0, backend=backend)
    with pytest.raises(ValueError, match="codes must be int64"):
        quantization.decode(codes[:, 1:], levels, backend=backend)
    with pytest.raises(ValueError, match="length is for sequences"):
        quantization.decode(codes, levels, length=9, backend=backend)
    with pytest.raises(ValueError, match="quantize is for sequences"):
        quantization.quantize(x, levels, backend=backend)
    first, f_hat = codes[:, : levels.schedule.lengths[0]], case.rows(torch.float32)
    with pytest.raises(ValueError, match="finest grid"):
        quantization.step(0, f_hat[:, 1:], first, levels, backend=backend)
    for wrong in (torch.zeros(16, 16, 3), torch.zeros(16, 16, 3, 5), torch.zeros(16, 16, 2, 2)):
        with pytest.raises(ValueError, match=r"must be \[16, 16, odd, odd\] and square"):
            quantization.encode(x, dataclasses.replace(levels, phi_weights=[wrong]), backend=backend)
    with pytest.raises(RuntimeError, match="codes must be in"):
        quantization.decode(codes + levels.codebook_size, levels, backend=backend)
    with pytest.raises(ValueError, match="module is for sequences"):
        MultiScaleResidualQuantizer(16, schedule=levels.schedule)


def test_backends_without_grids_say_so():
    problem = Problem("msrq_encode", "cuda", torch.float32, dim=8, needs=("grids",))
    with mock.patch.object(native_cuda, "library", mock.Mock(cuda_reason=None)):
        assert native_cuda.unsupported(problem) == "grids run on the CPU alone"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf(backend, bad):
    case = make_grid_case(3, batch=4)
    poisoned = case.x.clone()
    poisoned[1, 0, -1, -1] = bad
    codes, good = quantization.encode(poisoned, case.levels, backend=backend), [0, 2, 3]
    assert (codes[1] == -1).all()
    assert torch.equal(codes[good], quantization.encode(case.x[good], case.levels, backend=backend))


def test_an_empty_batch(backend):
    case = make_grid_case(3, batch=0)
    codes, schedule = quantization.encode(case.x, case.levels, backend=backend), case.levels.schedule
    assert codes.shape == (0, schedule.total)
    assert quantization.decode(codes, case.levels, backend=backend).shape == (0, 16, *schedule.grid)
    shape = (schedule.num_scales, 0, 16, *schedule.grid)
    assert quantization.decode_scales(codes, case.levels, backend=backend).shape == shape


# ------------------------------------------------------------------------------------------------------
# native


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    require("msrq_encode", "native")
    check_level(SCRIPT, level, cases=14)


def test_sanitizers():
    require("msrq_encode", "native")
    check_sanitized(SCRIPT, cases=8)


def test_reference_rows_and_images_agree():
    """`down` and `grid_action` of the last scale leave its rows as they are."""
    rows = torch.randn(2, 12, 3)
    assert reference.down(rows, 1, (4, 12), (2, 4)) is rows
    assert torch.equal(reference.grid_action(rows, 1, None, (4, 12), (2, 4)), rows)
