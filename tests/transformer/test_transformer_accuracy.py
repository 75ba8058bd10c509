"""Results against float64 and against the operators of the layers, and what the results of an item depend on."""

from __future__ import annotations

import pytest
import torch
from transformer_cases import DTYPES, check, layer_by_layer, make_case, run

import aar_kernels as ak
from aar_kernels.transformer import step

names = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(backend, seed):
    check(make_case(seed), backend)


@names
def test_sizes_of_a_model(fast, dtype):
    check(make_case(0, dtype, batch=2, heads=4, head_dim=64, hidden=1024, lengths=(1, 4, 16, 75)), fast)


@names
@pytest.mark.parametrize("seed", range(6))
def test_as_the_operators_of_its_layers_to_the_bit(fast, seed, dtype):
    case = make_case(seed, dtype)
    assert all(map(torch.equal, run(case, fast), layer_by_layer(case, fast)))


def test_an_item_does_not_depend_on_the_others(fast):
    case = make_case(3, batch=3)
    together = run(case, fast)[: len(case.parts)]
    for i in range(3):
        alone = case._replace(
            parts=[part[i : i + 1] for part in case.parts],
            modulations=[modulation[i : i + 1] for modulation in case.modulations],
        )
        assert all(torch.equal(one, all_[i : i + 1]) for one, all_ in zip(run(alone, fast), together, strict=False))


def test_a_nan_stays_in_its_item(fast):
    case = make_case(4, batch=2)
    expected = run(case, fast)
    case.parts[0][0, 0, 0] = torch.nan
    got = run(case, fast)
    for one, other in zip(got[: len(case.parts)], expected, strict=False):
        assert torch.equal(one[1], other[1])
        assert one[0].isnan().any()


def test_any_number_of_threads(fast):
    case = make_case(5, batch=2, heads=4, head_dim=64, hidden=300, lengths=(1, 20, 60))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case, fast)
        torch.set_num_threads(3)
        assert all(map(torch.equal, one, run(case, fast)))
    finally:
        torch.set_num_threads(threads)


def test_strided_caches_and_modulations(backend):
    """Caches that are part of a larger memory, and modulations that are rows of a wider tensor or one row for all."""
    case = make_case(6, batch=2, depth=2, heads=2, head_dim=8, lengths=(2, 5))
    expected = run(case, backend)[:2]
    memory = torch.full((2, 2, 4, 9, 2, 8), torch.nan)
    caches = [ak.ScaleCache(k, v) for k, v in memory[:, :, 1:3].unbind(0)]
    wide = [torch.cat([modulation, modulation], dim=1)[:, : modulation.shape[1]] for modulation in case.modulations]
    options = {"softmax_scale": case.softmax_scale, "backend": backend}
    for part, result in zip(case.parts, expected, strict=True):
        assert torch.equal(step(part, case.blocks, wide, caches, **options), result)
    assert memory[:, :, [0, 3]].isnan().all()
    assert memory[:, :, :, 7:].isnan().all()
    assert memory[:, :, 1:3, :7].isfinite().all()
    assert [cache.length for cache in caches] == [7, 7]
    same = [modulation[:1].expand_as(modulation) for modulation in case.modulations]
    copies = [modulation.contiguous() for modulation in same]
    results = [run(case._replace(modulations=each), backend) for each in (same, copies)]
    assert all(map(torch.equal, *results))


def test_no_items(backend):
    case = make_case(7, batch=0)
    assert [result.shape for result in run(case, backend)[:3]] == [part.shape for part in case.parts]
