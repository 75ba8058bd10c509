"""The operator as a citizen of PyTorch."""

from __future__ import annotations

import pytest
import torch
from transformer_cases import DTYPES, make_case, run

from aar_kernels.transformer import step


def _arguments(case, backend: str) -> tuple:
    weights = [weight for block in case.blocks for weight in block.weights]
    caches = [tensor.zero_() for cache in case.caches() for tensor in (cache.k, cache.v)]
    return (
        case.parts[0], [weight.data for weight in weights],
        [weight.scale for weight in weights if weight.scale is not None],
        [bias for block in case.blocks for bias in block.biases],
        [block.head_log_scale for block in case.blocks if block.head_log_scale is not None],
        case.modulations, caches, 0, case.heads, 0.3, 1e-6, backend,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_opcheck(fast, seed):
    """Schema (what it writes included), fake implementation, and tracing."""
    case = make_case(seed, DTYPES[seed % 3], batch=2, depth=2)
    torch.library.opcheck(torch.ops.aar_kernels.transformer_step.default, _arguments(case, fast))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(fast, compiler, mode):
    torch.compiler.reset()
    case = make_case(1, batch=2, depth=2)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with mode():
        expected, caches = run(case, fast), case.caches()
        options = {"softmax_scale": case.softmax_scale, "backend": fast}
        results = [compiled(part, case.blocks, case.modulations, caches, **options) for part in case.parts]
    results += [tensor for cache in caches for tensor in (cache.k, cache.v)]
    assert all(map(torch.equal, results, expected))
    torch.compiler.reset()


def test_caches_count_as_written(fast):
    """Autograd refuses to go back through a cache that it saved before."""
    case = make_case(2)
    caches = case.caches()
    versions = [cache.k._version for cache in caches]
    step(case.parts[0], case.blocks, case.modulations, caches, backend=fast)
    assert all(cache.k._version > version for cache, version in zip(caches, versions, strict=True))
