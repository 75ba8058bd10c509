"""Which backend runs, why not another, and how to force one; with two backends made up for the purpose."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

from aar_kernels import BackendError, dispatch, use_backend


@pytest.fixture
def operator(monkeypatch) -> str:
    """`madeup_add`: native takes float32 without gradients alone, triton cannot be imported, reference takes
    all."""

    def backend(**functions):
        return types.SimpleNamespace(unavailable=lambda: None, add=torch.add, **functions)

    def refuse(problem):
        if problem.dtype != torch.float32:
            return f"float32 only, not {problem.dtype}"
        return "no gradients here" if problem.needs_grad else None

    everything = backend(unsupported=lambda problem: None)
    narrow = backend(unsupported=refuse)
    for name, module in (("native", narrow), ("triton", None), ("reference", everything)):
        monkeypatch.setitem(sys.modules, f"made_up.{name}", module)
    monkeypatch.setitem(sys.modules, "made_up", types.ModuleType("made_up"))
    monkeypatch.setattr(dispatch, "_OPERATORS", {})
    monkeypatch.setattr(dispatch, "_forced", None)
    dispatch.register("made_up", "madeup_add")
    return "madeup_add"


def test_the_first_that_can_is_chosen(operator):
    assert dispatch.select(operator, torch.zeros(1)) == "native"
    assert dispatch.select(operator, torch.zeros(1).double()) == "reference"
    assert dispatch.select(operator, torch.zeros(1), needs_grad=True) == "reference"


def test_every_backend_has_its_reason(operator):
    reasons = dispatch.operators()[operator]
    assert reasons["native"] is None
    assert reasons["reference"] is None
    assert reasons["triton"] == "has no kernel for this operator"


def test_what_a_backend_lacks_is_its_reason(operator, monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dispatch.importlib, "import_module", import_module)
    assert dispatch.operators()[operator]["flash"] == "not importable: No module named 'triton'"


@pytest.mark.parametrize("how", ["argument", "context"])
def test_a_forced_backend_runs_or_tells_all_reasons(operator, how):
    def select(name, tensor):
        if how == "argument":
            return dispatch.select(operator, tensor, backend=name)
        with use_backend(name):
            return dispatch.select(operator, tensor)

    assert select("reference", torch.zeros(1)) == "reference"
    with pytest.raises(BackendError) as error:
        select("native", torch.zeros(1).double())
    message = str(error.value)
    assert "native: float32 only, not torch.float64" in message
    assert "triton: has no kernel for this operator" in message
    assert "reference: can run this call, but another backend was asked for" in message


def test_use_backend_nests_and_ends(operator):
    x = torch.zeros(1)
    with use_backend("reference"):
        with use_backend(None):
            assert dispatch.select(operator, x) == "native"
        with pytest.raises(KeyError), use_backend("native"):
            raise KeyError
        assert dispatch.select(operator, x) == "reference"
        assert (
            dispatch.select(operator, x, backend="native") == "native"
        )  # the argument is nearer to the call
    assert dispatch.select(operator, x) == "native"


def test_unknown_names(operator):
    for call in (
        lambda: dispatch.select(operator, torch.zeros(1), backend="fortran"),
        use_backend("fortran").__enter__,
    ):
        with pytest.raises(ValueError, match="unknown backend 'fortran'; one of native, flash, triton, reference"):
            call()


def test_tensors_must_share_a_device(operator):
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        dispatch.select(operator, torch.zeros(1), None, torch.zeros(1, device="meta"))


SCRIPT = """
import torch
from aar_kernels import ScaleSchedule, quantization
levels = quantization.Levels(ScaleSchedule([2]), torch.randn(1, 4, 3, dtype=torch.{dtype}))
print(quantization.encode(torch.randn(1, 3, 2), levels).shape)
"""


def run(dtype: str = "float32", **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT.format(dtype=dtype)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_the_environment_forces_a_backend():
    done = run(AAR_KERNELS_BACKEND="reference", AAR_KERNELS_LOG="1")
    assert done.returncode == 0, done.stderr
    assert "runs on reference" in done.stderr
    failed = run("float64", AAR_KERNELS_BACKEND="native")
    assert failed.returncode != 0
    assert "BackendError: backend 'native' cannot run" in failed.stderr
    unknown = run(AAR_KERNELS_BACKEND="fortran")
    assert "unknown backend 'fortran'" in unknown.stderr


def test_nothing_is_logged_unless_asked_for():
    done = run()
    assert done.returncode == 0
    assert done.stderr == ""
