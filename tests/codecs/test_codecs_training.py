"""Training gives the package's results where the search in each codebook is fused."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from codec_training_cases import TRAINING, Training, train
from helpers import assert_as_accurate

import aar_kernels as ak
from aar_kernels.codecs import search

pytestmark = pytest.mark.usefixtures("native")


def pair(case: Training):
    """The same quantizer twice, accelerated and as the package wrote it."""
    modules = []
    for _ in range(2):
        torch.manual_seed(3)
        modules.append(case.make())
    report = ak.accelerate(modules[0])
    assert len(report.replaced) == 1
    assert not report.left
    return modules


def assert_same(ours, theirs) -> None:
    """No near tie of these seeds is decided differently, so codes and draws are equal, and values but for rounding."""
    for a, b in zip(ours.codes, theirs.codes, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.random, theirs.random)
    for a, b in zip(ours.outputs, theirs.outputs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.double().abs().max().item()))


@pytest.fixture
def searches(monkeypatch) -> list:
    """How the operator was called."""
    calls, encode = [], search.quantization.encode

    def counted(*args, **kwargs):
        calls.append(args)
        return encode(*args, **kwargs)

    monkeypatch.setattr(search.quantization, "encode", counted)
    return calls


@pytest.mark.parametrize("name", TRAINING)
def test_training_steps(name, searches):
    """Quantized, codes, losses, all gradients, moving averages and replaced codes after five steps, the same draws."""
    case = TRAINING[name]
    module, original = pair(case)
    ours = train(case, module, 5)
    assert bool(searches) == case.fused
    theirs = train(case, original, 5)
    assert_same(ours, theirs)
    if not case.fused:
        assert all(torch.equal(a, b) for a, b in zip(ours.outputs, theirs.outputs, strict=True))


@pytest.mark.parametrize("name", [name for name, case in TRAINING.items() if case.fused])
def test_no_distances_and_no_one_hot_rows(name, monkeypatch):
    """The package's own search must not run: nothing above would notice."""
    case = TRAINING[name]
    module, _ = pair(case)
    train(case, module, case.own_steps)

    def fail(*_, **__):
        raise AssertionError("the original's search runs")

    monkeypatch.setattr(F, "one_hot", fail)
    monkeypatch.setattr(torch, "cdist", fail)
    packages = {type(part)._aar_original.__module__ for part in module.modules() if hasattr(part, "_aar_original")}
    for package in packages:
        if hasattr(sys.modules[package], "cdist"):
            monkeypatch.setattr(sys.modules[package], "cdist", fail)
    for part in module.modules():
        if hasattr(part, "decode_latents"):
            monkeypatch.setattr(type(part)._aar_original, "decode_latents", fail)
    train(case, module, 1)


@pytest.mark.parametrize("name", ["encodec", "encodec, no dead codes", "moshi", "descript-audio-codec", "snac"])
def test_accuracy(name):
    """No farther from the package in float64 than twice the package in float32."""
    case = TRAINING[name]
    module, original = pair(case)
    exact = copy.deepcopy(original).double() if not name.startswith(("descript", "snac")) else None
    if exact is None:  # weight norm of the old kind cannot be copied before its first forward pass
        torch.manual_seed(3)
        exact = case.make().double()
    for each, dtype in ((module, torch.float32), (original, torch.float32), (exact, torch.float64)):
        train(case, each, case.own_steps, dtype=dtype, seed=1)
    ours, theirs = train(case, module, 3), train(case, original, 3)
    truth = train(case, exact, 3, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(ours.codes, truth.codes, strict=True))
    for index, (a, b, c) in enumerate(zip(ours.outputs, theirs.outputs, truth.outputs, strict=True)):
        assert_as_accurate(a, b, c, f"output {index}")


@pytest.mark.parametrize("name", [name for name in TRAINING if "sampled" not in name and "Gumbel" not in name])
def test_evaluation_between_training_steps(name):
    """The packages write codebooks where no version counter sees it; what was packed must follow all the same."""
    case = TRAINING[name]
    module, original = pair(case)
    x = torch.randn(2, case.channels, 40, generator=torch.Generator().manual_seed(1))
    mask = name == "ResidualVQ, mask"
    train(case, module, case.own_steps)
    train(case, original, case.own_steps)
    for step in range(3):
        train(case, module, 1, seed=step)
        train(case, original, 1, seed=step)
        with torch.no_grad():
            ours, theirs = [
                case.call(m.eval(), x.repeat(2, 1, 1)[: 4 if mask else 2]) for m in (module, original)
            ]  # fmt: skip
        assert torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ResidualVQ", "encodec", "moshi", "descript-audio-codec", "transformers DAC", "snac"])
def test_restored_and_copied(name):
    """The package's own code goes on from where the operators were, and a copy goes its own way."""
    case = TRAINING[name]
    module, original = pair(case)
    train(case, module, 3)
    train(case, original, 3)
    if name not in ("descript-audio-codec", "snac", "moshi"):  # which hold tensors that are no leaves: not copied
        copied = copy.deepcopy(module)
        assert [type(part) for part in copied.modules()] == [type(part) for part in module.modules()]
        train(case, copied, 2, seed=7)
    ak.restore(module)
    names = [[type(part).__qualname__ for part in each.modules()] for each in (module, original)]
    assert names[0] == names[1]
    assert_same(train(case, module, 2, seed=1), train(case, original, 2, seed=1))


@pytest.mark.parametrize("name", ["ResidualVQ", "encodec", "moshi", "descript-audio-codec", "transformers DAC", "snac"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_mode_without_gradients(name, mode):
    """Moving averages move all the same."""
    case = TRAINING[name]
    module, original = pair(case)
    x = torch.randn(2, case.channels, 40, generator=torch.Generator().manual_seed(1))
    results = []
    for each in (module, original):
        torch.manual_seed(0)
        with mode():
            results.append([*case.call(each.train(), x), *(value.clone() for value in each.state_dict().values())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ResidualVQ", "encodec", "moshi", "descript-audio-codec", "transformers DAC", "snac"])
def test_values_that_no_codebook_knows(name):
    """A NaN has the original's answer in training too."""
    case = TRAINING[name]
    module, original = pair(case)
    train(case, module, 3)
    train(case, original, 3)
    x = torch.randn(2, case.channels, 40, generator=torch.Generator().manual_seed(1))
    x[0, 0, 3] = float("nan")
    results = []
    for each in (module, original):
        torch.manual_seed(0)
        results.append(case.call(each, x)[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_the_originals(dtype, searches):
    case = TRAINING["encodec, no dead codes"]
    module, original = pair(case)
    ours = train(case, module.to(dtype), 2, dtype=dtype)
    theirs = train(case, original.to(dtype), 2, dtype=dtype)
    assert not searches
    assert all(torch.equal(a, b) for a, b in zip(ours.outputs, theirs.outputs, strict=True))


def test_autocast_is_the_originals(searches):
    case = TRAINING["encodec, no dead codes"]
    module, original = pair(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = train(case, module, 2), train(case, original, 2)
    assert not searches
    assert all(torch.equal(a, b) for a, b in zip(ours.outputs, theirs.outputs, strict=True))


def test_two_forward_passes_before_a_backward_pass():
    """As where gradients of several batches are added up: codebooks have moved on when the first ones come."""
    case = TRAINING["ResidualVQ, cross entropy"]
    results = []
    for module in pair(case):
        torch.manual_seed(0)
        xs = [torch.randn(2, case.channels, 40).requires_grad_() for _ in range(2)]
        sum(case.call(module.train(), x)[2] for x in xs).backward()
        results.append([x.grad for x in xs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled():
    """The original is compiled, and the codebooks that it moves are packed anew."""
    case = TRAINING["encodec, no dead codes"]
    module, original = pair(case)
    x = torch.randn(2, case.channels, 40)
    module.eval()(x)
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        compiled.train()(x), original.train()(x)
    for ours, theirs in zip(module.eval()(x), original.eval()(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_part_of_another_version(monkeypatch):
    """Training is then the package's own, and the report says so once."""
    case = TRAINING["encodec"]
    module = case.make()
    book = type(module.layers[0]._codebook)
    monkeypatch.setattr(book, "forward", lambda self, x, temperature: None)
    report = ak.accelerate(module)
    assert len(report.replaced) == 1
    assert len(report.left) == 1
    assert "in training" in report.left[0].reason
    assert type(module.layers[0]._codebook) is book
