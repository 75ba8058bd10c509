"""Sampling as one CUDA graph, on a machine that has no GPU: not yet run on hardware.

Recorded on the CPU operator by operator and replayed, it gives the codes of the loop as it is called; traced on meta
tensors, which have no values, the loop never waits for the device, and launches what it should.
"""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import graph_recording
import pytest
import torch
from graph_recording import Launches, Recording, fake_triton, record_graphs
from test_aar import SMALL, codes, conditions, make

from aar import AAR
from aar.models import generation
from aar_kernels import dispatch, graph
from aar_kernels.linear import PackedWeight
from aar_kernels.quantization import triton_host

NARROW = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)


@pytest.fixture
def recorded(monkeypatch):
    record_graphs(monkeypatch)
    monkeypatch.setattr(generation, "_ungraphed", lambda *_: None)


def eager(model: AAR, *args, **options) -> torch.Tensor:
    return model.sample(*args, graph=False, **options)


def test_one_graph_serves_other_conditions_and_seeds(recorded):
    model = make()
    for i in range(3):
        condition, seeds = conditions(2, seed=i), [7 * i, 3]
        assert torch.equal(model.sample(condition, seed=seeds), eager(model, condition, seed=seeds))
    assert Recording.made == 1
    codes = [model.sample(conditions(2), seed=seed) for seed in (0, 1)]
    assert not torch.equal(*codes)  # nor is a result overwritten by the next


def test_unconditional(recorded):
    model = make()
    assert torch.equal(model.sample(num=2, seed=5), eager(model, num=2, seed=5))
    assert torch.equal(model.sample(num=2, seed=6), eager(model, num=2, seed=6))
    assert Recording.made == 1


@pytest.mark.parametrize("schedule", [(1, 3, 4, 9), (2, 2, 5), (4,)])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW, torch.float64])
def test_schedules_and_dtypes(recorded, schedule, dtype):
    model = make(replace(SMALL, lengths=schedule)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    model.sample(conditions(3), dtype=dtype)
    condition = conditions(3, seed=4)
    assert torch.equal(model.sample(condition, seed=9, dtype=dtype), eager(model, condition, seed=9, dtype=dtype))


def test_each_set_of_options_has_its_graph(recorded):
    model, found = make(), []
    options = [{}, {"cfg": 1.0}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}, {"dtype": torch.bfloat16}]
    for _ in range(2):
        for chosen in options:
            found.append(model.sample(conditions(2), **chosen))
            assert torch.equal(found[-1], eager(model, conditions(2), **chosen)), chosen
    model.sample(conditions(3))
    assert Recording.made == len(options) + 1
    assert len({tuple(codes.flatten().tolist()) for codes in found[:5]}) == 5  # else the options could be mixed up


def test_the_least_used_graph_goes_first(recorded, monkeypatch):
    monkeypatch.setattr(graph, "MAX_GRAPHS", 2)
    model = make()
    for batch in (1, 2, 1, 3, 1):  # 3 takes the place of 2
        model.sample(conditions(batch))
    assert Recording.made == 3
    model.sample(conditions(2))
    assert Recording.made == 4


CHANGES = {
    "optimizer": lambda model: _train(model),
    "copy": lambda model: model.start.copy_(make(seed=9).start),
    "null condition": lambda model: model.null_condition.mul_(-3),
    "codebooks": lambda model: model.quantizer.codebooks.neg_(),
    "phi": lambda model: model.quantizer.phi[0].weight.neg_(),
    "load_state_dict": lambda model: model.load_state_dict(make(seed=9).state_dict()),
    "another object": lambda model: setattr(
        model.blocks[0].fc1, "weight", torch.nn.Parameter(-model.blocks[0].fc1.weight)
    ),
    "data": lambda model: setattr(model.head.weight, "data", -model.head.weight.data),
    "another dtype": lambda model: model.double(),
}


def _train(model: AAR) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model.loss(conditions(2), torch.zeros(2, SMALL.schedule.total, dtype=torch.int64)).backward()
        optimizer.step()


@pytest.mark.parametrize("how", CHANGES)
@torch.no_grad()
def test_a_changed_weight_makes_a_new_graph(recorded, how):
    model = make()
    model.sample(conditions(4), seed=3)
    CHANGES[how](model)
    found = model.sample(conditions(4), seed=3)
    assert Recording.made == 2
    assert torch.equal(found, copy.deepcopy(model).sample(conditions(4), seed=3, graph=False))


def test_graphs_of_one_stream_share_their_memory(recorded, monkeypatch):
    model = make()
    model.sample(conditions(1))
    model.sample(conditions(2))
    other = graph_recording.Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: other)
    found = model.sample(conditions(2), seed=4)
    assert torch.equal(found, eager(model, conditions(2), seed=4))
    first, second, third = generation._graphs_of(model)._graphs.values()
    assert first.pool is second.pool
    assert first.pool is not third.pool


def test_graphs_die_with_the_model(recorded):
    model = make()
    model.sample(conditions(1))
    alive, graphs = weakref.ref(model), len(generation._graphs)
    held = weakref.ref(next(iter(generation._graphs_of(model)._graphs.values())))
    del model
    gc.collect()
    assert alive() is None
    assert held() is None
    assert len(generation._graphs) == graphs - 1


def test_what_it_reads_lives_as_long_as_the_graph(recorded):
    """The packed weights and tables, though the caches forget them."""
    model = make()
    model.sample(conditions(1))
    (kept,) = generation._graphs_of(model)._graphs.values()
    engine = generation.engine_of(model, torch.float32)
    assert any(value is engine for value in kept._kept)
    assert graph.keep(3) == 3
    assert 3 not in kept._kept  # no longer in the making


def test_a_failed_capture_leaves_nothing(recorded):
    model = make()
    with pytest.raises(RuntimeError, match="(?i)nan"):
        model.sample(torch.full((1, SMALL.condition_dim), torch.nan))
    assert graph._keepers.values is None
    assert not generation._graphs_of(model)._graphs


def test_nan_is_found_in_a_replay(recorded):
    model = make()
    model.sample(conditions(1))
    with pytest.raises(RuntimeError, match="(?i)nan"):
        model.sample(torch.full((1, SMALL.condition_dim), torch.nan))


def test_from_inference_mode_and_back(recorded):
    model = make()
    with torch.inference_mode():
        first = model.sample(conditions(2))
    assert torch.equal(model.sample(conditions(2)), first)
    assert Recording.made == 1


@pytest.mark.parametrize(
    ("batch", "callback", "inference", "captured", "reason"),
    [
        (0, None, False, False, "no items"),
        (2, print, False, False, "callback"),
        (2, None, True, False, "inference mode"),
        (2, None, False, True, "being captured"),
        (2, None, False, False, None),
    ],
)
def test_where_there_can_be_no_graph(monkeypatch, batch, callback, inference, captured, reason):
    monkeypatch.setattr(generation, "capturing", lambda: captured)
    position = SimpleNamespace(device=torch.device("cuda"), is_inference=lambda: inference)
    why_not = generation._ungraphed(SimpleNamespace(position=position), batch, callback)
    assert why_not is None if reason is None else reason in why_not


def test_a_graph_that_cannot_be_is_an_error_only_where_it_was_asked_for():
    model = make()
    with pytest.raises(ValueError, match="no CUDA graph: the model is on cpu"):
        model.sample(conditions(1), graph=True)
    assert torch.equal(model.sample(conditions(1)), eager(model, conditions(1)))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu(dtype):
    model = make().cuda()
    for i in range(3):
        condition, seeds = conditions(2, seed=i).cuda(), [7 * i, 3]
        found = model.sample(condition, seed=seeds, dtype=dtype, graph=True)
        assert torch.equal(found, eager(model, condition, seed=seeds, dtype=dtype))
        with torch.no_grad():
            model.blocks[0].fc1.weight.mul_(-1.5)


def logits_of_scales(model: AAR, dtype: torch.dtype) -> torch.Tensor:
    """Teacher-forced, as sampling computes them."""
    run = generation.Run(model, generation.Engine(model, dtype), conditions(3), False)
    inputs = model.quantizer.next_scale_inputs(codes(3)).split(SMALL.lengths[1:], dim=1)
    return torch.cat([run.logits(scale, rows)[0] for scale, rows in enumerate([None, *inputs])], dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_activations_are_as_exact_as_autocast(monkeypatch, dtype):
    """As on CUDA, where nothing is packed: all but the residual stream is in the weights' dtype."""
    monkeypatch.setattr(generation, "_is_packed", lambda *_: False)
    model, casts = make(), torch.autocast("cpu", dtype)
    exact = copy.deepcopy(model).double()(conditions(3).double(), codes(3))
    with casts:
        plain = model(conditions(3), codes(3))
    ours = logits_of_scales(model, dtype)
    assert ours.dtype == dtype
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (ours, plain))
    assert error <= 2 * allowed
    assert torch.equal(logits_of_scales(model, torch.float32).argmax(-1), exact.argmax(-1))


# ------------------------------------------------------------------------------------------------------
# traced on meta tensors


SIZES = replace(SMALL, depth=3, lengths=(1, 2, 4, 7, 9))


def of_block(layer: str, *activation: str) -> list[str]:
    attention = [layer, "attention.step", layer, "modulation.forward"]
    return [*attention, layer, *activation, layer, "modulation.forward"]


@pytest.fixture
def launches(monkeypatch):
    """What the loop launches on its second run, given options: the first fills the caches."""

    def trace(cfg: float, dtype: torch.dtype, batch: int = 2) -> list[str]:
        found = Launches()
        fake_triton(monkeypatch, found)
        dispatch._select_cached.cache_clear()
        monkeypatch.setattr(generation, "pack", packed_without_a_look)
        with torch.device("meta"), torch.no_grad():
            model = AAR(SIZES)
            engine, options = generation.Engine(model, dtype), generation.Options(cfg, 1.0, 200, 0.95)
            inputs = torch.empty(batch, SIZES.condition_dim), torch.empty(batch, dtype=torch.int64)
            generation.run_scales(model, engine, options, *inputs)
            found.names.clear()
            with found, monkeypatch.context() as patched:
                patched.setattr(torch, "tensor", None)  # copies from the host, which meta tensors do not show
                codes = generation.run_scales(model, engine, options, *inputs)
            assert codes.shape == (batch, SIZES.schedule.total)
        return found.names

    yield trace
    dispatch._select_cached.cache_clear()
    triton_host._uploaded.cache_clear()  # of meta tensors


def packed_without_a_look(weight: torch.Tensor, dtype: torch.dtype) -> PackedWeight:
    """As `pack` does, which asks whether the weight is finite."""
    scale = None if dtype == torch.bfloat16 else torch.empty(len(weight))
    return PackedWeight(torch.empty_like(weight, dtype=dtype), scale, len(weight))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("cfg", [0.0, 4.0])
def test_what_is_launched_between_two_scales(launches, cfg, dtype):
    """The draw, the codes' contribution and its pooling, the embedding's product, and the addition of the positions;
    where weights are narrow, bias and GELU are part of the products, and nothing is cast."""
    names = launches(cfg, dtype)
    draws = [i for i, name in enumerate(names) if name == "sampling.sample"]
    assert len(draws) == SIZES.schedule.num_scales
    layer, activation = ("linear.linear", ()) if dtype in NARROW else ("addmm", ("gelu",))
    blocks = SIZES.depth * of_block(layer, *activation)
    scale = ["quantization.step", layer, "add", "modulation.forward", *blocks, layer]
    for start, stop in pairwise(draws):
        assert names[start + 1 : stop] == scale
    assert names[draws[-1] + 1 :] == ["cat"]
    assert names.count("quantization.table") == 0  # made once, not by the loop


def test_that_waiting_is_found():
    """Else the tests above show nothing."""
    with Launches() as found:
        x = torch.zeros(3, device="meta")
        for wait in (lambda: x.nonzero(), lambda: x[x > 0], lambda: x.cpu()):
            with pytest.raises((AssertionError, NotImplementedError)):
                wait()
    with pytest.raises((RuntimeError, NotImplementedError)), found:
        x.sum().item()
