"""The operator as a citizen of PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from sampling_cases import draw_call

from aar_kernels.sampling import sample


def call() -> dict:
    generator = torch.Generator().manual_seed(0)
    logits, uncond = torch.randn(2, 3, 8, 50, generator=generator)
    settings = {"guidance": 2.0, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "position": 4}
    return {"logits": logits, "uncond": uncond, "seeds": torch.arange(3)} | settings


@pytest.mark.parametrize("with_uncond", [True, False])
def test_opcheck(backend, with_uncond):
    logits, uncond, seeds, *_ = call().values()
    arguments = logits, uncond if with_uncond else None, seeds, 4, 2.0, 0.9, 20, 0.9, backend
    torch.library.opcheck(torch.ops.aar_kernels.sampling_sample.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(backend, compiler):
    torch.compiler.reset()
    arguments = call()
    run = torch.compile(lambda **call: sample(**call, backend=backend), fullgraph=True, backend=compiler)
    assert torch.equal(run(**arguments), sample(**arguments, backend=backend))


def test_one_graph_serves_every_position(backend):
    """As a sampling loop has them: more tokens, and others, at every scale."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda **call: sample(**call, backend=backend), fullgraph=True, backend=counter)
    for position in range(2, 20):
        more = {name: call()[name].repeat(1, position, 1) for name in ("logits", "uncond")}
        arguments = call() | more | {"position": 8 * position}
        assert torch.equal(run(**arguments), sample(**arguments, backend=backend))
    assert counter.frame_count <= 2


def test_views(backend):
    """Halves of one tensor, strides, and storage that begins elsewhere."""
    arguments = call()
    expected = sample(**arguments, backend=backend)
    halves = torch.cat([arguments["logits"], arguments["uncond"]]).chunk(2)
    strided = [torch.stack([half, half], -1)[..., 0] for half in halves]
    transposed = [half.permute(2, 0, 1).contiguous().permute(1, 2, 0) for half in halves]
    seeds = torch.stack([arguments["seeds"]] * 2, -1)[:, 1]
    for logits, uncond in (halves, strided, transposed):
        changed = arguments | {"logits": logits, "uncond": uncond, "seeds": seeds}
        assert torch.equal(sample(**changed, backend=backend), expected)


def test_half_precision_is_converted_exactly(backend):
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: value.to(dtype) for name, value in call().items() if name in ("logits", "uncond")}
        single = {name: value.float() for name, value in half.items()}
        codes = [sample(**call() | logits, backend=backend) for logits in (half, single)]
        assert torch.equal(*codes)


def test_inputs_are_left_alone_and_have_no_gradient(backend):
    arguments = call()
    before = {name: arguments[name].clone() for name in ("logits", "uncond", "seeds")}
    arguments["logits"].requires_grad_()
    assert not sample(**arguments, backend=backend).requires_grad
    for name, value in before.items():
        assert torch.equal(arguments[name], value)


def test_autocast_and_the_global_generator_change_nothing(backend):
    arguments = draw_call(8, vocabulary=64) | {"temperature": 1.0}
    expected, state = sample(**arguments, backend=backend), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sample(**arguments, backend=backend), expected)
    assert torch.equal(torch.get_rng_state(), state)
