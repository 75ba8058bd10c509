"""The operators as citizens of PyTorch: derivatives, operator checks, compilation, devices,
reproducibility."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from cases import as_dtype, make_case

from aar_kernels import ScaleSchedule, quantization, use_backend
from aar_kernels.nn import MultiScaleResidualQuantizer

OPTIONS = {"batch": 2, "latent": 3, "size": 7, "kind": "unordered"}


@pytest.mark.parametrize("sharing", ["partial", "absent"])
@pytest.mark.parametrize("name", ["decode", "decode_scales", "next_scale_inputs", "step"])
def test_gradcheck_of_decoding(name, sharing):
    """By codebooks and phi, in float64."""
    levels = as_dtype(make_case(1, sharing=sharing, **OPTIONS).levels, torch.float64)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 7, (2, levels.schedule.total), generator=generator)
    f_hat = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    count = len(levels.phi_weights)

    def run(f_hat, codebooks, *phi):
        given = quantization.Levels(
            levels.schedule, codebooks, phi[:count], phi[count:], levels.phi_index, levels.metric
        )
        if name == "step":
            return quantization.step(0, f_hat, codes[:, : levels.schedule.lengths[0]], given)
        return getattr(quantization, name)(codes, given, length=9)

    inputs = [f_hat, *(weight.requires_grad_() for weight in levels.weights)]
    torch.autograd.gradcheck(run, inputs, fast_mode=True)


def operator_arguments(name: str, backend: str, seed: int) -> tuple:
    case = make_case(seed, batch=2, latent=8, size=32)
    levels, rows = case.levels, case.x.mT.contiguous()
    codes = torch.randint(-1, 32, (2, levels.schedule.total), generator=torch.Generator().manual_seed(0))
    if name == "encode":
        return rows, case.mask, *levels.arguments(), backend
    if name == "step":
        return rows, codes[:, : levels.schedule.lengths[0]].contiguous(), *levels.arguments(), 0, backend
    if name == "quantize":
        for tensor in (rows, *levels.weights[1:]):
            tensor.requires_grad_()
        samples = torch.zeros(levels.codebooks.shape[:2], dtype=torch.int64) if seed % 2 else None
        return rows, case.mask, *levels.arguments(), samples, True, seed % 3 > 0, True, backend
    if name == "update":
        hits = torch.ones(levels.codebooks.shape[:2])
        statistics = torch.cat([hits.flatten(), torch.ones_like(levels.codebooks).flatten()])
        averages = levels.codebooks.clone(), hits, levels.codebooks.clone()
        return *averages, statistics, 0.9, 1e-5, 0.0, backend
    return codes, *levels.arguments(), case.length, backend


@pytest.mark.parametrize("seed", [0, 1, 4])
@pytest.mark.parametrize(
    "name", ["encode", "decode", "decode_scales", "next_scale_inputs", "step", "quantize", "update"]
)
def test_opcheck(fast, name, seed):
    """Schema, fake implementation, autograd registration, and tracing with dynamic shapes."""
    operator = getattr(torch.ops.aar_kernels, f"msrq_{name}").default
    torch.library.opcheck(operator, operator_arguments(name, fast, seed))


# ------------------------------------------------------------------------------------------------------
# compilation


@pytest.fixture
def compiled(backend):
    """``compiled(function)``, for one backend of ours inside. What a compiler would do with the graph is its
    affair, so that most tests stop before that."""
    torch.compiler.reset()
    with use_backend(backend):
        yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


def small(**options) -> MultiScaleResidualQuantizer:
    torch.manual_seed(0)
    defaults = {
        "codebook_size": 16,
        "phi_kernel_sizes": (3, 5),
        "kmeans_init": False,
        "dead_code_threshold": 1.0,
    }
    return MultiScaleResidualQuantizer(8, schedule=ScaleSchedule((1, 3, 6)), **defaults | options)


@torch.no_grad()
def test_compiled_inference(compiled):
    module, x = small().eval(), torch.randn(2, 8, 6)
    codes = module.encode(x)
    assert torch.equal(compiled(module.encode)(x), codes)
    f_hat = torch.randn(2, 6, 8)

    def everything(codes, f_hat):
        return (
            module.decode(codes), module.decode_scales(codes), module.next_scale_inputs(codes),
            *module.step(1, f_hat, codes[:, 1:4]),
        )  # fmt: skip

    for ours, eager in zip(compiled(everything)(codes, f_hat), everything(codes, f_hat), strict=True):
        torch.testing.assert_close(ours, eager)


def test_compiled_evaluation_forward(compiled):
    module, x = small().eval(), torch.randn(2, 8, 6)
    with torch.no_grad():
        for ours, eager in zip(compiled(module)(x), module(x), strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("options", [{}, {"phi_kernel_sizes": ()}], ids=["phi", "plain"])
def test_compiled_training_step(compiled, options):
    assert_training_steps_equal(compiled, **options)


def test_training_step_compiled_by_inductor(fast):
    torch.compiler.reset()
    with use_backend(fast), torch._inductor.config.patch(fallback_random=True):
        assert_training_steps_equal(lambda function: torch.compile(function, fullgraph=True))
    torch.compiler.reset()


def assert_training_steps_equal(compiler, **options) -> None:
    """Results, gradients, and the codebooks afterwards, over two steps with dead codes replaced."""
    eager, module = small(**options).train(), small(**options).train()
    run = compiler(module)
    for step in range(2):
        x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(step))
        mask = torch.arange(6) < torch.tensor([6, 5, 3, 6])[:, None]
        results = []
        for function, owner in ((run, module), (eager, eager)):
            torch.manual_seed(step)
            owner.zero_grad()
            inputs = x.clone().requires_grad_()
            quantized, codes, loss = function(inputs, mask=mask)
            (quantized.square().mean() + loss).backward()
            grads = [parameter.grad for parameter in owner.parameters()]
            results.append(
                [quantized, codes, loss, inputs.grad, *grads, *(b.clone() for b in owner.buffers())]
            )
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_compiled_for_any_batch_and_length(compiled):
    """One graph serves all sizes: the second compilation is dynamic, and there is no third."""
    module = small().eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(module.encode, fullgraph=True, backend=counter)
    for batch, length in ((2, 6), (3, 9), (5, 11), (7, 13)):
        x = torch.randn(batch, 8, length)
        assert torch.equal(run(x), module.encode(x))
    assert counter.frame_count <= 2


@torch.no_grad()
def test_compiled_code_sees_a_changed_codebook(compiled):
    module, x = small().eval(), torch.randn(2, 8, 6)
    run = compiled(module.encode)
    before = run(x)
    module.codebooks.copy_(module.codebooks.flip(1))
    assert torch.equal(run(x), module.encode(x))
    assert not torch.equal(run(x), before)


# ---------------------------------------------------------------------------------------------------------
# the rest


def test_autocast_leaves_the_search_in_float32(backend):
    """Under autocast the projection gives bfloat16; what follows is what it is without autocast for that
    input."""
    torch.manual_seed(0)
    module = MultiScaleResidualQuantizer(
        12, latent_dim=8, schedule=ScaleSchedule((1, 3, 6)), codebook_size=16, kmeans_init=False
    ).eval()
    x = torch.randn(2, 12, 6)
    with torch.no_grad(), use_backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            codes = module.encode(x)
            projected = module.project_in(x.mT).mT
            quantized, again, loss = module(x)
        assert projected.dtype == torch.bfloat16
        assert torch.equal(codes, quantization.encode(projected, module.levels))
        assert torch.equal(again, codes)
        assert loss.dtype == torch.float32
        assert quantized.isfinite().all()


def test_training_does_not_depend_on_the_number_of_threads(fast):
    """Sums of phi's gradients are the only ones that each thread begins anew."""
    case, results, before = make_case("published"), [], torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(quantization.quantize(case.x, case.levels, statistics=True, backend=fast))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_either_result_alone_has_a_gradient(backend):
    """The quantized sequence's is known in closed form; both together are the sum."""
    case, grads = make_case("published"), []
    phi = [weight.requires_grad_() for weight in case.levels.weights[1:]]
    for use in (lambda q, loss: q.sum(), lambda q, loss: loss, lambda q, loss: q.sum() + loss):
        x = case.x.clone().requires_grad_()
        quantized, _, loss, _ = quantization.quantize(x, case.levels, backend=backend)
        grads.append(torch.autograd.grad(use(quantized, loss), [x, *phi], allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(grads[0][0], torch.full_like(case.x, float(case.levels.schedule.num_scales)))
    for alone, other, both in zip(*grads, strict=True):
        torch.testing.assert_close(alone + other, both)
    assert all(grad.abs().max() > 0 for grad in grads[1])


def test_results_do_not_depend_on_the_run(backend):
    case = make_case("published")
    results = [quantization.quantize(case.x, case.levels, statistics=True, backend=backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inference_mode(backend):
    """Inference tensors have no version counter, so nothing is remembered for them: a change is seen all the
    same."""
    with torch.inference_mode(), use_backend(backend):
        module, x = small().eval(), torch.randn(2, 8, 6)
        module.encode(x)
        module.codebooks.copy_(module.codebooks.flip(1))
        codes = module.encode(x)
    with use_backend("reference"), torch.no_grad():
        assert torch.equal(module.encode(x), codes)


def test_saving_copying_and_converting(backend):
    """state_dict round trip, deepcopy, and .double() and back, after the caches were filled."""
    module, x = small().eval(), torch.randn(2, 8, 6)
    with torch.no_grad(), use_backend(backend):
        codes = module.encode(x)
        other = small(kmeans_init=True)
        other.codebooks.normal_()
        assert not torch.equal(other.encode(x), codes)
        other.load_state_dict(module.state_dict())
        twin = copy.deepcopy(module)
        module.codebooks.normal_()
        assert torch.equal(other.encode(x), codes)
        assert torch.equal(twin.encode(x), codes)
        assert torch.equal(twin.double().float().encode(x), codes)
        assert not torch.equal(module.encode(x), codes)
    with torch.no_grad():
        assert twin.double().decode(codes).dtype == torch.float64
