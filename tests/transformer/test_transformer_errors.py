"""Wrong input meets the same answer on every backend: an error that names what is wrong, and caches as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformer_cases import make_case

from aar_kernels import BackendError
from aar_kernels.linear import pack
from aar_kernels.transformer import Block, step

CASE = make_case(0, torch.float32, batch=2, heads=2, head_dim=8, hidden=24, depth=2, cosine=True, lengths=(3, 4))
X, BLOCKS, MODULATIONS = CASE.parts[0], CASE.blocks, CASE.modulations


def fails(match: str, backend: str, x=X, blocks=BLOCKS, modulations=MODULATIONS, caches=None) -> None:
    caches = CASE.caches() if caches is None else caches
    lengths = [cache.length for cache in caches]
    with pytest.raises(ValueError, match=match):
        step(x, blocks, modulations, caches, backend=backend)
    assert [cache.length for cache in caches] == lengths


@pytest.mark.parametrize("x", [X[0], X[..., :8], X[:, :0], X.half(), X.int()])
def test_wrong_x(backend, x):
    fails(r"x must be fp32 or fp64 \[B, n >= 1, 16\], got", backend, x=x)


def test_wrong_numbers_of_blocks(backend):
    for arguments in ({"blocks": []}, {"blocks": BLOCKS[:1]}, {"modulations": MODULATIONS[:2]}, {"caches": []}):
        fails("there must be a cache for each", backend, **arguments)


@pytest.mark.parametrize("wrong", [MODULATIONS[0][:, :95], MODULATIONS[0][:1], MODULATIONS[0].double()])
def test_wrong_modulation(backend, wrong):
    fails(r"modulation 0 must be torch\.float32 \[2, 96\], got", backend, modulations=[wrong, *MODULATIONS[1:]])


def test_wrong_caches(backend):
    def caches(**attributes):
        first, second = CASE.caches()
        return [first, replace(second, **attributes)]

    k = CASE.caches()[0].k
    for wrong in (caches(k=k.double()), caches(k=k[:, :6]), caches(length=1)):
        fails("all caches must be", backend, caches=wrong)
    for wrong in (k[:1], k[..., :7], k[0]):
        both = [replace(cache, k=wrong, v=wrong) for cache in CASE.caches()]
        fails("a cache must be|all caches must be", backend, caches=both)
    strided = k.mT.contiguous().mT
    fails("contiguous", backend, caches=[replace(cache, k=strided, v=strided) for cache in CASE.caches()])
    full = [replace(cache, length=5) for cache in CASE.caches()]
    fails("3 more tokens do not fit: the caches hold 5 of 7", backend, caches=full)


def test_blocks_that_differ(backend):
    other = make_case(0, torch.int8, batch=2, heads=2, head_dim=8, depth=1, cosine=True).blocks[0]
    fails("same channels and dtype", backend, blocks=[BLOCKS[0], other])
    plain = replace(BLOCKS[1], head_log_scale=None)
    fails("all blocks have a head_log_scale, or none", backend, blocks=[BLOCKS[0], plain])
    fails("must have 2 heads", backend, blocks=[replace(block, head_log_scale=torch.zeros(4)) for block in BLOCKS])


def test_a_wrong_block():
    first = BLOCKS[0]
    with pytest.raises(ValueError, match="weights of a block of 16 channels must be"):
        Block(first.qkv, first.fc2, first.fc1, first.proj, first.biases)
    with pytest.raises(ValueError, match="of one dtype"):
        replace(first, proj=pack(torch.randn(16, 16), dtype=torch.int8))
    with pytest.raises(ValueError, match=r"a bias must be contiguous fp32 \[48\], got"):
        replace(first, biases=(first.biases[0].double(), *first.biases[1:]))
    with pytest.raises(ValueError, match="head_log_scale must be contiguous fp32"):
        replace(first, head_log_scale=torch.zeros(2, dtype=torch.float64))


def test_gradients(backend):
    x = X.clone().requires_grad_()
    fails("not differentiable", backend, x=x)
    with torch.no_grad():
        step(x, BLOCKS, MODULATIONS, CASE.caches(), backend=backend)


def test_a_forced_backend_that_cannot_run_says_why():
    modulations = [modulation.double() for modulation in MODULATIONS]
    with pytest.raises(BackendError, match="native: (computes in float32|no native library)"):
        step(X.double(), BLOCKS, modulations, CASE.caches(torch.float64), backend="native")


def test_the_binding_checks_what_could_read_outside(fast):
    """It is the last line before raw pointers."""
    weights = [weight.data for block in BLOCKS for weight in block.weights]
    biases = [bias for block in BLOCKS for bias in block.biases]
    scales = [block.head_log_scale for block in BLOCKS]
    caches = [tensor for cache in CASE.caches() for tensor in (cache.k, cache.v)]
    right = [X, weights, [], biases, scales, MODULATIONS, caches, 0, 2, 1.0, 1e-6]
    call = torch.ops.aar_native.transformer_step
    call(*right)
    short = [cache[:, :2] for cache in caches]
    narrow = [cache[..., :7] for cache in caches]
    for place, wrong in (
        (0, X[..., :14].contiguous()), (0, X.double()), (0, X[:1].contiguous()), (0, X.mT.contiguous().mT),
        (1, weights[:7]), (1, weights[::-1]), (1, [weight.half() for weight in weights]),
        (2, biases), (2, biases[:3]), (3, biases[:7]), (3, biases[::-1]), (4, scales[:1]),
        (4, [torch.zeros(1)] * 2), (5, MODULATIONS[:2]), (5, MODULATIONS[::-1]),
        (5, [modulation[:1] for modulation in MODULATIONS]), (6, caches[:3]), (6, short), (6, narrow), (7, -1), (7, 6),
        (8, 3), (8, 0),
    ):  # fmt: skip
        arguments = [*right[:place], wrong, *right[place + 1 :]]
        with pytest.raises(RuntimeError, match="aar_native"):
            call(*arguments)
