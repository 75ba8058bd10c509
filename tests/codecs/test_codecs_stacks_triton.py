"""Convolutional stacks of other packages' autoencoders on the Triton backend, in its interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

import interpreter
import test_codecs_stacks as stacks

import aar_kernels as ak


@torch.no_grad()
@pytest.mark.parametrize("package", ["transformers EnCodec", "transformers Mimi"])
def test_stacks(package, monkeypatch):
    """The original's code runs for the comparison, and never again."""

    def fail(*_, **__):
        raise AssertionError("the original runs")

    for kind, x in (("Encoder", stacks.waves(60)), ("Decoder", torch.randn(2, 16, 9))):
        stack = stacks.CAUSAL[package](kind)
        theirs = stack(x)
        assert len(ak.accelerate(stack, backend="triton").replaced) == 1
        first = stack(x)  # packs the weights, which are compared with the original's on a probe
        monkeypatch.setattr(type(stack)._aar_original, "forward", fail)
        ours = stack(x)
        assert torch.equal(ours, first)
        stacks.assert_near(ours, theirs)


interpreter.isolate(globals())
