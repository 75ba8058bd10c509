"""Derived values are kept while nothing they depend on has changed, and never longer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from aar_kernels.cache import DerivedCache


class Doubled:
    """A derived value that remembers what it was made of."""

    def __init__(self, *tensors):
        self.values = [2 * tensor.detach() for tensor in tensors]


@pytest.fixture
def cache() -> DerivedCache:
    return DerivedCache()


def get(cache, *tensors, options=()):
    return cache.get(tensors, lambda: Doubled(*tensors), *options)


def is_fresh(cache, *tensors) -> bool:
    return all(torch.equal(a, 2 * b) for a, b in zip(get(cache, *tensors).values, tensors, strict=True))


def test_a_second_look_builds_nothing(cache):
    a, b = torch.randn(3), torch.randn(4)
    assert get(cache, a, b) is get(cache, a, b)
    assert get(cache, a) is not get(cache, b)
    assert get(cache, a, b) is get(cache, a, b)


def test_options_tell_values_apart(cache):
    a = torch.randn(3)
    first, second = get(cache, a, options=("euclidean",)), get(cache, a, options=("cosine",))
    assert first is not second
    assert get(cache, a, options=("euclidean",)) is first


def in_place(tensor):
    tensor.mul_(3)


def through_a_view(tensor):
    tensor[1:].zero_()


def through_an_alias(tensor):
    tensor.detach().add_(1)


def new_data(tensor):
    tensor.data = torch.randn(5)


def out_argument(tensor):
    torch.add(torch.ones(5), torch.ones(5), out=tensor)


@pytest.mark.parametrize("change", [in_place, through_a_view, through_an_alias, new_data, out_argument])
@pytest.mark.parametrize("place", [0, 1])
def test_a_change_is_seen(cache, change, place):
    tensors = [torch.randn(5), torch.randn(5)]
    before = get(cache, *tensors)
    change(tensors[place])
    assert get(cache, *tensors) is not before
    assert is_fresh(cache, *tensors)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_step_is_seen(cache, optimizer, foreach):
    parameter = nn.Parameter(torch.randn(5))
    optimizer = optimizer([parameter], lr=0.1, foreach=foreach)
    get(cache, parameter)
    parameter.grad = torch.ones(5)
    optimizer.step()
    assert is_fresh(cache, parameter)


def test_loading_and_converting_are_seen(cache):
    module = nn.Linear(3, 3)
    get(cache, module.weight)
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    assert is_fresh(cache, module.weight)
    module.double()
    assert is_fresh(cache, module.weight)
    assert get(cache, module.weight).values[0].dtype == torch.float64
    module.load_state_dict({name: value - 1 for name, value in module.state_dict().items()}, assign=True)
    assert is_fresh(cache, module.weight)


def test_new_data_at_an_old_address_is_seen(cache):
    """The storage that was replaced is freed, and the next one may take its place: same address, other
    values."""
    tensor = torch.randn(5)
    for value in range(100):
        tensor.data = torch.full((5,), float(value))
        assert is_fresh(cache, tensor)
        tensor.data = torch.empty(0)  # frees it without a look at the cache


def test_a_new_tensor_with_an_old_id_is_seen(cache):
    for value in range(100):
        tensor = torch.full((5,), float(value))
        assert is_fresh(cache, tensor)
        del tensor


@pytest.mark.parametrize("last", [0, 1])
def test_an_entry_dies_with_any_of_its_tensors(cache, last):
    tensors = [torch.randn(3), torch.randn(3)]
    value = weakref.ref(get(cache, *tensors))
    in_place(tensors[0])
    latest = weakref.ref(get(cache, *tensors))
    gc.collect()
    assert value() is None  # replaced
    assert latest() is not None
    del tensors[last]
    gc.collect()
    assert latest() is None


def test_clear(cache):
    """The way out for writes that PyTorch does not see."""
    tensor = torch.randn(3)
    get(cache, tensor)
    tensor.numpy()[:] = 7
    cache.clear()
    assert is_fresh(cache, tensor)


def test_inference_tensors_are_not_remembered(cache):
    with torch.inference_mode():
        tensor = torch.randn(3)
        assert is_fresh(cache, tensor)
        tensor.mul_(2)
        assert is_fresh(cache, tensor)
    assert is_fresh(cache, tensor)


def test_a_build_that_fails_leaves_nothing(cache):
    tensor = torch.randn(3)
    with pytest.raises(ZeroDivisionError):
        cache.get([tensor], lambda: 1 // 0)
    assert is_fresh(cache, tensor)
