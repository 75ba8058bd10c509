"""What the Triton backend remembers of weights, inside and outside of CUDA graphs. Needs neither Triton nor a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from aar_kernels import graph
from aar_kernels.cache import DerivedCache
from aar_kernels.quantization import native_cuda, triton_host


class OnCuda(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


@pytest.fixture
def weight(monkeypatch) -> torch.Tensor:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: "main")
    monkeypatch.setattr(triton_host, "_derived", DerivedCache())
    return torch.zeros(3).as_subclass(OnCuda)


@pytest.fixture(params=["triton", "native"])
def remember(request, weight):
    """Counts how often a value of the weight is built."""
    built, cache = [], DerivedCache()

    def build() -> list:
        built.append(1)
        return built

    def ask() -> int:
        if request.param == "triton":
            triton_host.Memo(weight)(build, "name")
        else:
            native_cuda._remember(cache, [weight], build)
        return len(built)

    return ask


def test_remembered_until_the_weight_changes(remember, weight):
    assert [remember(), remember()] == [1, 1]
    weight.add_(1)
    assert [remember(), remember()] == [2, 2]


def test_each_stream_has_its_own(remember, monkeypatch):
    assert remember() == 1
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: "side")
    assert remember() == 2


def test_a_graph_that_keeps_nothing_computes_it_itself(remember, monkeypatch):
    """And what it computed, which is not there before a replay, is nobody else's."""
    remember()
    monkeypatch.setattr(graph, "capturing", lambda: True)
    assert [remember(), remember()] == [2, 3]
    monkeypatch.setattr(graph, "capturing", lambda: False)
    assert remember() == 3


def test_a_graph_of_ours_keeps_what_was_remembered(remember, monkeypatch):
    remember()
    monkeypatch.setattr(graph, "capturing", lambda: True)
    monkeypatch.setattr(graph, "_keepers", SimpleNamespace(values=[]))
    assert remember() == 1
    assert len(graph._keepers.values) == 1


def test_numbers_on_the_device_are_kept_too(monkeypatch):
    monkeypatch.setattr(graph, "_keepers", SimpleNamespace(values=[]))
    found = triton_host.upload([(1, 2), (3, 4)], torch.int32, torch.device("cpu"))
    assert graph._keepers.values[0] is found
    assert found.tolist() == [[1, 2], [3, 4]]
    assert triton_host.upload([(1, 2), (3, 4)], torch.int32, torch.device("cpu")) is found


def test_of_no_weights_nothing_is_remembered():
    built = []
    for _ in range(2):
        triton_host.Memo()(lambda: built.append(1), "name")
    assert len(built) == 2
