"""SAT's autoencoder on the Triton kernels, in Triton's interpreter: where it was asked for, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")

import interpreter
from helpers import assert_as_accurate
from small import noise, tiny_sat

from aar import SATConfig
from aar.models import inference
from aar_kernels import use_backend
from aar_kernels.seanet import triton as backend

SMALL = SATConfig(
    n_filters=5, ratios=(4, 3, 1), lengths=(1, 3, 7), dim=20, latent_dim=10, lstm_layers=2, codebook_size=9
)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The operators that ran on Triton kernels."""
    found = []
    for name in ("stack", "lstm"):
        run = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *args, name=name, run=run: found.append(name) or run(*args))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_as_accurate_as_the_modules(calls, dtype):
    model = tiny_sat(1, SMALL).to(dtype)
    exact, wav = copy.deepcopy(model).double(), noise(3, 1, SMALL.window_samples).to(dtype)
    halves = ((model.encoder, exact.encoder, wav), (model.decoder, exact.decoder, model.encoder(wav)))
    for network, same, x in halves:
        plain = network(x)
        assert not calls
        with use_backend("triton"):
            ours = inference.run(network, x)
        assert calls == ["stack", "lstm", "stack"]
        calls.clear()
        assert_as_accurate(ours, plain, same(x.double()))


def test_only_where_asked_for(calls):
    model, wav = tiny_sat(1, SMALL), noise(2, 1, 3 * SMALL.window_samples)
    codes = model.encode(wav)
    assert not calls
    with use_backend("triton"):
        assert torch.equal(model.encode(wav), codes)
    assert calls


interpreter.isolate(globals())
