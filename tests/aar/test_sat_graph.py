"""SAT's encoding and decoding as CUDA graphs, on a machine that has no GPU: not yet run on hardware.

Recorded on the CPU operator by operator and replayed, they give what the methods give; traced on meta tensors, which
have no values, they never wait for the device.
"""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from graph_recording import Launches, Recording, fake_triton, record_graphs
from helpers import require
from small import AUTOENCODERS, TINY, noise, tiny_sat
from test_sat_inference import folded, loaded, replaced, stepped

from aar import SAT
from aar.models import inference
from aar_kernels import dispatch, use_backend
from aar_kernels.quantization import triton_host


@pytest.fixture
def recorded(monkeypatch):
    record_graphs(monkeypatch)
    monkeypatch.setattr(inference, "_ungraphed", lambda *_: False)


def eager(model: SAT, wav: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and waves without graphs, of a copy: it shares nothing that was remembered."""
    model = copy.deepcopy(model)
    codes = model._codes_of(wav)
    return codes[:, None], model._waves_of(codes)


@torch.no_grad()
def check(model: SAT, wav: torch.Tensor) -> torch.Tensor:
    codes, waves = eager(model, wav)
    assert torch.equal(model.encode(wav), codes)
    assert torch.equal(model.decode(codes), waves)
    return codes


def test_one_graph_serves_other_waves(recorded):
    model = tiny_sat(2, AUTOENCODERS[0])
    found = [check(model, noise(2, 1, 24000, seed=seed)) for seed in range(3)]
    assert Recording.made == 2  # to encode, and to decode
    assert not torch.equal(found[0], found[1])


def test_each_number_of_windows_has_its_graph(recorded):
    model, steps = tiny_sat(), []
    wav = noise(1, 1, 10 * 24000)  # eight windows, and two
    codes = model.encode(wav, progress=steps.append)
    assert steps == [8, 2]
    assert Recording.made == 2
    model.encode(noise(2, 1, 24000))
    assert Recording.made == 2
    assert torch.equal(codes[0, 3:4], model.encode(wav[..., 3 * 24000 : 4 * 24000])[0])
    assert Recording.made == 3


def test_scales_are_decoded_without(recorded):
    model = tiny_sat()
    codes = model.encode(noise(1, 1, 24000))
    made = Recording.made
    waves = model.decode_scales(codes)
    assert Recording.made == made
    assert torch.equal(waves[-1], model.decode(codes))


def codebooks(model):
    model.quantizer.codebooks.neg_()


def phi(model):
    with torch.no_grad():
        model.quantizer.phi[0].weight.neg_()


@pytest.mark.parametrize("change", [stepped, loaded, replaced, folded, codebooks, phi, SAT.double])
def test_a_changed_weight_makes_new_graphs(recorded, change):
    model, wav = tiny_sat(), noise(2, 1, 24000)
    check(model, wav)
    change(model)
    check(model, wav.to(model._dtype))
    assert Recording.made == 4


def test_graphs_die_with_the_model_and_keep_what_they_read(recorded):
    require("seanet_stack", "native")
    gc.collect()  # the models of other tests
    model = tiny_sat()
    model.encode(noise(1, 1, 24000))
    (graph,) = inference._graphs.get(model._weights, inference.Graphs)._graphs.values()
    packed = inference._packed.get(list(model.encoder.parameters()), object)
    assert any(value is packed for value in graph._kept)
    graph, entries = weakref.ref(graph), len(inference._graphs)
    del model
    gc.collect()
    assert graph() is None
    assert len(inference._graphs) == entries - 1


@pytest.mark.parametrize(
    ("backend", "device", "weights_on", "inference_mode", "captured", "graph"),
    [
        ("triton", "cuda", "cuda", False, False, True),
        (None, "cuda", "cuda", False, False, False),  # not asked for: these kernels have not run on hardware
        ("native", "cuda", "cuda", False, False, False),
        ("triton", "cpu", "cpu", False, False, False),
        ("triton", "cuda", "cpu", False, False, False),
        ("triton", "cuda", "cuda", True, False, False),
        ("triton", "cuda", "cuda", False, True, False),
    ],
)
def test_where_there_is_a_graph(monkeypatch, backend, device, weights_on, inference_mode, captured, graph):
    monkeypatch.setattr(inference, "capturing", lambda: captured)
    weight = SimpleNamespace(device=torch.device(weights_on), is_inference=lambda: inference_mode)
    with use_backend(backend):
        assert inference._ungraphed(SimpleNamespace(device=torch.device(device)), [weight]) is not graph


def test_nothing_waits_for_the_device(monkeypatch):
    """And what is launched: a kernel for each layer, beside PyTorch's LSTM."""
    pytest.importorskip("triton")
    fake_triton(monkeypatch, found := Launches())
    dispatch._select_cached.cache_clear()
    with torch.device("meta"), torch.no_grad(), use_backend("triton"):
        model, wav = SAT(TINY), torch.empty(2, 1, 24000)
        model._waves_of(model._codes_of(wav))  # the first run fills the caches
        found.names.clear()
        with found:
            waves = model._waves_of(model._codes_of(wav))
    dispatch._select_cached.cache_clear()
    triton_host._uploaded.cache_clear()  # of meta tensors
    assert waves.shape == wav.shape
    launched = [name for name in found.names if name.startswith("seanet.")]
    encoder = ["seanet.conv", *4 * ["seanet.residual", "seanet.conv"], "seanet.conv"]
    decoder = ["seanet.conv", *4 * ["seanet.conv", "seanet.residual"], "seanet.conv"]
    assert launched == encoder + decoder


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu():
    model = tiny_sat().cuda()
    for seed in range(3):
        wav = noise(2, 1, 24000, seed=seed).cuda()
        with use_backend("triton"):
            codes = check(model, wav)
        assert torch.equal(model.double().encode(wav.double()), codes)
        with torch.no_grad():
            model.float().encoder.model[0].conv.conv.bias.add_(0.1)
