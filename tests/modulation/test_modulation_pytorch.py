"""The operators as citizens of PyTorch: derivatives, operator checks, compilation, autocast, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from modulation_cases import DTYPES, forward, make_case, training_step
from torch._dynamo.testing import CompileCounterWithBackend

from aar_kernels import BackendError, modulation


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("expanded", [True, False], ids=["[B, 1, C]", "[B, C]"])
def test_gradcheck_of_the_reference(gated, expanded):
    case = make_case(0, length=3, channels=4, gated=gated, expanded=expanded).double()
    inputs = [tensor.requires_grad_() for tensor in (case.x, case.y, case.projection) if tensor is not None]

    def run(x, *rest):
        return forward(case, x, rest[0] if gated else None, rest[-1], "reference")

    torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("used", ["x_new", "modulated"])
def test_a_result_without_a_gradient(fast, used):
    """The last half-block of a model uses one of the two results alone."""
    gradients = {}
    exact = make_case(0).double()
    for name, backend, case in (("fast", fast, make_case(0)), ("plain", None, make_case(0)), ("exact", None, exact)):
        inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.y, case.projection)]
        result = forward(case, *inputs, backend or "reference")[0 if used == "x_new" else 1]
        gradients[name] = torch.autograd.grad(result.square().sum(), inputs)
    for fast_gradient, plain, exact in zip(*gradients.values(), strict=True):
        assert_as_accurate(fast_gradient, plain, exact)


@pytest.mark.parametrize("needed", ["x", "y", "gate", "scale", "shift"])
def test_gradients_by_one_input_alone(fast, needed):
    case = make_case(0)
    shift, scale, gate = case.projection.chunk(6, dim=-1)[1:4]
    inputs = {"x": case.x, "y": case.y, "gate": gate, "scale": scale, "shift": shift}
    all_inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    one = {name: tensor.detach().clone().requires_grad_(name == needed) for name, tensor in inputs.items()}
    gradients = [
        torch.autograd.grad(
            sum(out.square().sum() for out in modulation.gated_residual_modulate(**given, backend=fast)), given[needed]
        )[0]
        for given in (all_inputs, one)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(fast, dtype, gated):
    """Schema, fake implementation, autograd registration, and tracing with dynamic shapes."""
    case = make_case(0, dtype=dtype, gated=gated, y_dtype=torch.bfloat16)
    shift, scale, gate = (part.clone().requires_grad_() for part in case.projection.chunk(6, dim=-1)[1:4])
    y = case.y.requires_grad_() if gated else None
    arguments = (case.x.requires_grad_(), y, gate if gated else None, scale, shift, 1e-6, torch.bfloat16, fast)
    torch.library.opcheck(torch.ops.aar_kernels.modulation_forward.default, arguments)
    x_new, modulated, statistics = torch.ops.aar_kernels.modulation_forward(*arguments)
    saved = (x_new if gated else case.x, y, gate if gated else None, scale, statistics)
    arguments = (x_new if gated else None, modulated, *saved)
    arguments = tuple(None if tensor is None else tensor.detach() for tensor in arguments)
    torch.library.opcheck(torch.ops.aar_kernels.modulation_backward.default, (*arguments, fast))


def block(x, condition, weight, backend):
    """Two half-blocks of a model, with slices of one projection and a linear layer each."""
    shift1, scale1, gate1, shift2, scale2, gate2 = condition.chunk(6, dim=-1)
    h = modulation.layer_norm_modulate(x, scale1, shift1, backend=backend)
    x, h = modulation.gated_residual_modulate(x, F.linear(h, weight), gate1, scale2, shift2, backend=backend)
    x, h = modulation.gated_residual_modulate(x, F.linear(h, weight), gate2, scale1, shift1, backend=backend)
    return x, h


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiled_training_step(backend, compiler, autocast):
    torch.compiler.reset()
    run = torch.compile(block, fullgraph=True, backend=compiler)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator) for shape in ((2, 5, 64), (2, 384), (64, 64))]
    inputs[2] /= 8
    results = []
    for function in (run, block):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = function(*leaves, backend)
        sum(out.float().square().mean() for out in outputs).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    assert results[0][1].dtype == (torch.bfloat16 if autocast else torch.float32)
    for compiled, eager in zip(*results, strict=True):
        if compiler == "aot_eager" and not autocast:
            assert torch.equal(compiled, eager)
        else:  # compiled code rounds less in between, and adds the weight's gradients before they are rounded
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
            torch.testing.assert_close(compiled, eager, **tolerance)
    torch.compiler.reset()


def test_compiled_for_any_batch_and_length(fast):
    """One graph serves all sizes: the second compilation is dynamic, and there is no third."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(modulation.gated_residual_modulate, fullgraph=True, backend=counter)
    for batch, length in ((2, 6), (3, 9), (5, 11), (7, 13)):
        case = make_case(0, batch=batch, length=length)
        gate, scale, shift, *_ = case.projection.chunk(6, dim=-1)
        arguments = (case.x, case.y, gate, scale, shift)
        for compiled, eager in zip(
            run(*arguments, backend=fast), modulation.gated_residual_modulate(*arguments, backend=fast), strict=True
        ):
            assert torch.equal(compiled, eager)
    assert counter.frame_count <= 2
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_autocast_decides_the_dtype_of_what_is_modulated(backend, dtype):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    for enabled in (False, True):
        case = make_case(0, dtype=dtype, autocast=torch.bfloat16 if enabled else None)
        x_new, modulated = forward(case, case.x, case.y, case.projection, backend)
        assert x_new.dtype == dtype
        assert modulated.dtype == (torch.bfloat16 if enabled and dtype != torch.float64 else dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert forward(case.double(), case.x, case.y, case.projection, backend)[1].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_of_what_is_modulated_can_be_asked_for(backend, dtype):
    """Autocast has no say then; arithmetic is fp32 before that."""
    case = make_case(0)
    scale, shift = case.projection.chunk(6, dim=-1)[:2]
    for run in (
        lambda **options: modulation.layer_norm_modulate(case.x, scale, shift, **options),
        lambda **options: modulation.gated_residual_modulate(case.x, case.y, scale, scale, shift, **options)[1],
    ):
        wide = run(backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(dtype=dtype, backend=backend), wide.to(dtype))


def test_bitwise_the_same_with_any_number_of_threads(fast):
    case = make_case(0, batch=3, length=101, channels=100)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(training_step(case, fast))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_inputs_are_left_alone(backend):
    case = make_case(0)
    copies = [tensor.clone() for tensor in (case.x, case.y, case.projection)]
    training_step(case, backend)
    assert all(map(torch.equal, copies, (case.x, case.y, case.projection)))


X, ROW = torch.zeros(2, 3, 4), torch.zeros(2, 4)
BAD = {
    "two dimensions": ({"x": X[0]}, "x must be"),
    "integers": ({"x": X.long()}, "x must be"),
    "no channels": ({"x": X[..., :0]}, "x must be"),
    "y of another shape": ({"y": X[:, :2]}, "y must be"),
    "wider y": ({"y": X.double()}, "y must be torch.float32 as x, or"),
    "integer y": ({"y": X.int()}, "y must be torch.float32 as x, or"),
    "gate for one item": ({"gate": ROW[:1]}, "gate must be"),
    "scale per token": ({"scale": X}, "scale must be"),
    "shift without items": ({"shift": ROW[0]}, "shift must be"),
    "wider scale": ({"scale": ROW.double()}, "scale must be torch.float32 as x, or"),
    "wider result": ({"dtype": torch.float64}, "dtype must be torch.float32 as x, or"),
    "another device": ({"shift": ROW.to("meta")}, "one device"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments = {"x": X, "y": X, "gate": ROW, "scale": ROW, "shift": ROW} | change
    with pytest.raises(ValueError, match=message):
        modulation.gated_residual_modulate(**arguments, backend=backend)


def test_float64_is_for_the_reference(fast):
    case = make_case(0).double()
    with pytest.raises(BackendError, match="x must be fp32, bf16 or fp16"):
        forward(case, case.x, case.y, case.projection, fast)
    assert forward(case, case.x, case.y, case.projection, None)[1].dtype == torch.float64
