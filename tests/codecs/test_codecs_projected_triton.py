"""Factorised quantizers of other packages on the Triton backend, in its interpreter. Small cases: it is slow."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

import interpreter
from codec_cases import originals
from factorised_cases import FACTORISED, assert_same, make_factorised
from test_codecs_projected import arguments, sequence

import aar_kernels as ak


@pytest.mark.parametrize("name", FACTORISED)
@torch.no_grad()
def test_results(name):
    case = make_factorised(name, random.Random(f"{name} 1"))
    original = originals(case.module)
    assert len(ak.accelerate(case.module, backend="triton").replaced) == 1
    x = sequence(case, 2, 9)
    ours, theirs = (module(x, *arguments(name, case.levels)) for module in (case.module, original))
    if assert_same(ours[1], theirs[1], original, case.strides, x):
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b)
    torch.testing.assert_close(case.decode(case.module, theirs[1]), case.decode(original, theirs[1]))


interpreter.isolate(globals())
