"""VAR's quantizer and attention give the same results when they are accelerated.

On modules of the same interface that are our own, and, where AAR_VAR_SOURCE is the path of a checkout of
FoundationVision/VAR, on the original.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import random
import sys

import pytest
import torch
import var_plain
from codec_cases import originals
from quantization.cases import assert_codes
from quantization.grid_cases import GridCase
from torch import nn

import aar_kernels as ak
from aar_kernels import GridSchedule, ScaleSchedule
from aar_kernels.codecs.adapter import Adapter
from aar_kernels.quantization import Levels, phi_sharing_index, residual_phi

pytestmark = pytest.mark.usefixtures("native")

SIDES = (1, 2, 3, 5, 8)


@functools.cache
def _theirs() -> tuple[type, type]:
    path = os.environ["AAR_VAR_SOURCE"]
    sys.path.insert(0, path)
    try:
        return (
            importlib.import_module("models.quant").VectorQuantizer2,
            importlib.import_module("models.basic_var").SelfAttention,
        )
    finally:
        sys.path.remove(path)


@pytest.fixture(params=["ours", "VAR's"])
def classes(request) -> tuple[type, type]:
    if request.param == "ours":
        return var_plain.VectorQuantizer2, var_plain.SelfAttention
    if "AAR_VAR_SOURCE" not in os.environ:
        pytest.skip("AAR_VAR_SOURCE is not the path of a checkout of FoundationVision/VAR, which is not on PyPI")
    return _theirs()


def quantizer(classes, seed: int = 0, **options) -> nn.Module:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    chosen = {
        "vocab_size": rng.choice((50, 128)), "Cvae": rng.choice((8, 20, 32)), "using_znorm": seed % 3 == 2,
        "v_patch_nums": (SIDES, (1, 4, 6), (2, 7))[seed % 3], "quant_resi": (0.5, 0.3, -0.8, 0.0)[seed // 2 % 4],
        "share_quant_resi": (4, 1, 0, 2)[seed % 4],
    }  # fmt: skip
    return classes[0](**chosen | options).eval().requires_grad_(False)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module accelerated, and a copy as it was."""
    original = originals(module)
    report = ak.accelerate(module)
    assert len(report.replaced) == 1, report
    return module, original


def images(module: nn.Module, batch: int, grid: tuple[int, int] | None = None, seed: int = 0) -> torch.Tensor:
    size = grid or (module.v_patch_nums[-1],) * 2
    return torch.randn(batch, module.Cvae, *size, generator=torch.Generator().manual_seed(seed))


def levels_of(module: nn.Module, grids) -> Levels:
    """By the constructor's arguments, not by the adapter's ways."""
    schedule, scales = GridSchedule(grids), len(grids)
    convolutions = [part for part in module.quant_resi.modules() if isinstance(part, nn.Conv2d)]
    phis = [residual_phi(conv.weight, conv.bias, conv.resi_ratio) for conv in convolutions]
    index = phi_sharing_index(len(phis), scales) if phis else ()
    metric = "cosine" if module.using_znorm else "euclidean"
    return Levels(schedule, module.embedding.weight[None], [w for w, _ in phis], [b for _, b in phis], index, metric)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_all_results(classes, seed):
    module, original = pair(quantizer(classes, seed))
    keys = list(module.state_dict())
    x = images(module, 1 + seed % 8, seed=seed)
    ours, theirs = (each.f_to_idxBl_or_fhat(x, to_fhat=False) for each in (module, original))
    codes, expected = torch.cat(ours, dim=1), torch.cat(theirs, dim=1)
    assert [part.shape for part in ours] == [part.shape for part in theirs]
    case = GridCase(levels_of(original, original.v_patch_nums), x, None)
    assert_codes(codes, case)
    if not torch.equal(codes, expected):
        assert_codes(expected, case)  # both are as near as float32 can tell
        assert (codes != expected).any(dim=1).sum() <= 1
    else:
        for a, b in zip(module.f_to_idxBl_or_fhat(x, True), original.f_to_idxBl_or_fhat(x, True), strict=True):
            torch.testing.assert_close(a, b)
        (quantized, usages, loss), (q, _, known) = module(x), original(x)
        torch.testing.assert_close(quantized, q)
        torch.testing.assert_close(loss, known)
        assert usages is None
    inputs = module.idxBl_to_var_input(theirs), original.idxBl_to_var_input(theirs)
    torch.testing.assert_close(*inputs)
    alone = [torch.cat(module.f_to_idxBl_or_fhat(item[None], False), dim=1) for item in x]
    assert torch.equal(torch.cat(alone), codes)
    assert list(module.state_dict()) == keys
    ak.restore(module)
    assert type(module) is type(original)
    assert torch.equal(torch.cat(module.f_to_idxBl_or_fhat(x, False), dim=1), expected)


@torch.no_grad()
def test_published_sizes(classes):
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    model = quantizer(classes, vocab_size=4096, Cvae=32, v_patch_nums=sides, share_quant_resi=4, quant_resi=0.5)
    module, original = pair(model)
    x = images(module, 2)
    codes, expected = (torch.cat(each.f_to_idxBl_or_fhat(x, False), dim=1) for each in (module, original))
    assert codes.unique().numel() > 100
    assert_codes(codes, GridCase(levels_of(original, sides), x, None))
    assert (codes == expected).float().mean() > 0.99


@torch.no_grad()
def test_other_grids_than_its_own(classes):
    """As the package's callers give them: sides, or pairs, up to the size of the image."""
    module, original = pair(quantizer(classes))
    for grids in ((1, (2, 3), (4, 3), (6, 9)), [(1, 1), (5, 2)], (1, 2, 3)):
        x = images(module, 3, grids[-1] if isinstance(grids[-1], tuple) else (grids[-1],) * 2)
        results = [each.f_to_idxBl_or_fhat(x, False, v_patch_nums=grids) for each in (module, original)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        for a, b in zip(*(each.f_to_idxBl_or_fhat(x, True, grids) for each in (module, original)), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(AssertionError):
        module.f_to_idxBl_or_fhat(images(module, 1), False, v_patch_nums=(1, 2, 3))


@torch.no_grad()
def test_the_fused_operators_run(classes, monkeypatch):
    module, _ = pair(quantizer(classes))
    x = images(module, 2)

    def fail(*_, **__):
        raise AssertionError("the original runs")

    names = "f_to_idxBl_or_fhat", "idxBl_to_var_input", "embed_to_fhat", "get_next_autoregressive_input", "forward"
    for name in names:
        monkeypatch.setattr(type(module)._aar_original, name, fail)
    codes = module.f_to_idxBl_or_fhat(x, False)
    module.idxBl_to_var_input(codes)
    module.f_to_idxBl_or_fhat(x, True)
    module(x)
    rows = [module.embedding(part).mT.unflatten(2, (n, n)) for part, n in zip(codes, SIDES, strict=True)]
    module.embed_to_fhat(rows)
    module.get_next_autoregressive_input(1, len(SIDES), torch.zeros_like(x), rows[1])


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2, 6])
def test_rows_that_are_no_codes(classes, seed):
    """Mixtures, as VAR's smooth sampling makes them; f_hat is changed in place."""
    module, original = pair(quantizer(classes, seed))
    sides, generator = module.v_patch_nums, torch.Generator().manual_seed(seed)
    rows = [torch.randn(3, module.Cvae, n, n, generator=generator) for n in sides]
    for ours, theirs in zip(module.embed_to_fhat(rows), original.embed_to_fhat(rows), strict=True):
        torch.testing.assert_close(ours, theirs)
    last = module.embed_to_fhat(rows, last_one=True), original.embed_to_fhat(rows, last_one=True)
    torch.testing.assert_close(*last)
    start = torch.randn(3, module.Cvae, sides[-1], sides[-1], generator=generator)
    for s, h in enumerate(rows):
        f_hats = start.clone(), start.clone()
        ours = module.get_next_autoregressive_input(s, len(sides), f_hats[0], h)
        theirs = original.get_next_autoregressive_input(s, len(sides), f_hats[1], h)
        assert ours[0] is f_hats[0]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


@torch.no_grad()
def test_a_sampling_loop(classes):
    """From codes, image by image: the steps of the sampler end where the codes' decoding does."""
    module, original = pair(quantizer(classes, v_patch_nums=SIDES))
    codes = module.f_to_idxBl_or_fhat(images(module, 2), False)
    final = module.f_to_idxBl_or_fhat(images(module, 2), True)[-1]
    steps = []
    for each in (module, original):
        f_hat, inputs = torch.zeros_like(final), []
        for s, (part, n) in enumerate(zip(codes, SIDES, strict=True)):
            rows = each.embedding(part).mT.unflatten(2, (n, n)).contiguous()
            f_hat, following = each.get_next_autoregressive_input(s, len(SIDES), f_hat, rows)
            inputs.append(following)
        torch.testing.assert_close(f_hat, final)
        steps.append(torch.cat([part.flatten(2).mT for part in inputs[:-1]], dim=1))
    torch.testing.assert_close(*steps)
    torch.testing.assert_close(module.idxBl_to_var_input(codes), steps[0])


def test_what_is_the_originals(classes):
    """Gradients, also by rows, NaN, codes outside the codebook, half precision, one scale, progressive training."""
    module, original = pair(quantizer(classes))
    x = images(module, 2)
    codes = [part.clone() for part in original.f_to_idxBl_or_fhat(x, False)]
    codes[0][0, 0] = 10**6
    for each in (module, original):
        with pytest.raises(IndexError):
            each.idxBl_to_var_input(codes)
    poisoned = x.clone()
    poisoned[0, 0, 0, 0] = torch.nan
    assert all(map(torch.equal, *(each.f_to_idxBl_or_fhat(poisoned, False) for each in (module, original))))
    for each in (module, original):
        each.prog_si = 1
    assert all(map(torch.equal, *(each.f_to_idxBl_or_fhat(x, False) for each in (module, original))))
    module.prog_si = original.prog_si = -1

    rows = torch.randn(2, module.Cvae, 1, 1).requires_grad_()
    grads = []
    for each in (module, original):
        f_hat, _ = each.get_next_autoregressive_input(0, len(SIDES), torch.zeros_like(x), rows)
        grads.append(torch.autograd.grad(f_hat.square().sum(), rows)[0])
    assert torch.equal(*grads)

    results = []
    for each in (module.train(), original.train()):
        each.requires_grad_()
        inputs = x.clone().requires_grad_()
        quantized, _, loss = each(inputs)
        (quantized.square().mean() + loss).backward()
        results.append([quantized, loss, inputs.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_weights_are_read_live(classes):
    module, original = pair(quantizer(classes))
    x = images(module, 2)
    before = module.f_to_idxBl_or_fhat(x, True)[-1]
    changes = [lambda m: m.embedding.weight.neg_()]
    changes += [lambda m, i=i: list(m.quant_resi.parameters())[i].mul_(-2) for i in (0, 1)]
    for change in changes:
        for each in (module, original):
            change(each)
        after, expected = (each.f_to_idxBl_or_fhat(x, True)[-1] for each in (module, original))
        torch.testing.assert_close(after, expected)
        assert not torch.equal(after, before)
        before = after
    copied = copy.deepcopy(module)
    module.embedding.weight.zero_()
    torch.testing.assert_close(copied.f_to_idxBl_or_fhat(x, True)[-1], before)


def test_reasons():
    classes = var_plain.VectorQuantizer2, var_plain.SelfAttention
    model = nn.ModuleDict({
        "fine": quantizer(classes), "in double": quantizer(classes).double(), "one scale": quantizer(classes),
        "other": quantizer(classes), "strided": quantizer(classes), "xformers": classes[1](0, 32, 2),
        "masked otherwise": classes[1](0, 32, 2),
    })  # fmt: skip
    model["one scale"].v_patch_nums = (4,)
    model["strided"].quant_resi.kernels[0].padding = (0, 0)
    model["xformers"].using_xform = True
    model["masked otherwise"].scale *= 2

    class Changed(var_plain.SelfAttention):
        pass

    model["subclass"] = Changed(0, 32, 2)
    nearest = model["other"]._nearest
    model["other"]._nearest = lambda rows: nearest(-rows)
    report = ak.accelerate(model)
    assert [entry.path for entry in report.replaced] == ["fine", "masked otherwise"]
    said = {entry.path: entry.reason for entry in report.left}
    for path, reason in {
        "in double": "float64", "one scale": "its scales are", "other": "on a probe its codes", "strided": "square",
        "xformers": "flash-attn or xformers", "subclass": "a subclass",
    }.items():  # fmt: skip
        assert reason in said[path]
    assert "at 1x1 2x2 3x3 5x5 8x8 tokens, euclidean" in str(report)
    ak.restore(model)
    assert not any(isinstance(module, Adapter) for module in model.modules())


# ------------------------------------------------------------------------------------------------------
# attention


SCHEDULE = ScaleSchedule((1, 4, 9, 25, 64))


def attention(classes, cosine: bool, heads: int = 4, head_dim: int = 16) -> nn.Module:
    torch.manual_seed(0)
    module = classes[1](0, heads * head_dim, heads, attn_l2_norm=cosine, flash_if_available=False).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.2))
        if cosine:
            module.scale_mul_1H11.copy_(torch.linspace(0.5, 6.0, heads).view(1, -1, 1, 1))  # some beyond the clamp
    return module


def masking(schedule: ScaleSchedule) -> torch.Tensor:
    return torch.zeros(1, 1, schedule.total, schedule.total).masked_fill(~schedule.mask(), -torch.inf)


def tokens(batch: int, length: int, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_masked_attention(classes, cosine, head_dim):
    """Values and gradients, under the mask of scales and under none."""
    module, original = pair(attention(classes, cosine, head_dim=head_dim))
    mask = masking(SCHEDULE)
    for bias in (mask, mask[:, :, :39, :39], None):
        length = 103 if bias is None else bias.shape[-1]
        results = []
        for each in (module, original):
            x = tokens(3, length, 4 * head_dim).requires_grad_()
            each.zero_grad()
            out = each(x, bias)
            out.square().mean().backward()
            results.append([out, x.grad, *(parameter.grad for parameter in each.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cosine", [True, False])
def test_cached_attention(classes, cosine):
    """Scale by scale equals the masked pass and the original; what is cached is readable, and can be handed over."""
    module, original = pair(attention(classes, cosine))
    x = tokens(2, SCHEDULE.total)
    whole = module(x, masking(SCHEDULE))
    for _ in range(2):
        for each in (module, original):
            each.kv_caching(True)
        for part in SCHEDULE.slices():
            ours, theirs = module(x[:, part], None), original(x[:, part], None)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours, whole[:, part], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(module.cached_k, original.cached_k)
            torch.testing.assert_close(module.cached_v, original.cached_v)
    for each in (module, original):
        each.kv_caching(True)
        each(x[:, :5], None)
    twin = copy.deepcopy(module)
    ak.restore(module)
    module(x[:, 5:14], None)
    ak.accelerate(module)
    original(x[:, 5:14], None)
    twin(x[:, 5:14], None)
    for each in (module, twin):
        torch.testing.assert_close(each(x[:, 14:39], None), original(x[:, 14:39], None), rtol=1e-4, atol=1e-5)
        original.cached_k, original.cached_v = (held[:, :, :14] for held in (original.cached_k, original.cached_v))
    module.kv_caching(False)
    assert module.cached_k is None


@torch.no_grad()
def test_the_cache_is_written_in_place(classes):
    module, _ = pair(attention(classes, True))
    module.kv_caching(True)
    module(tokens(1, 10), None)
    before = module.cached_k.data_ptr()
    module(tokens(1, 10), None)
    assert module.cached_k.data_ptr() == before
    assert module.cached_k.shape == (1, 4, 20, 16)


def test_attention_that_is_the_originals(classes, monkeypatch):
    """Other masks, gradients through a cache, dropout, autocast."""
    module, original = pair(attention(classes, True))
    calls = []
    run = type(module)._aar_original.forward
    monkeypatch.setattr(type(module)._aar_original, "forward", lambda *args: calls.append(1) or run(*args))
    x, other = tokens(2, 103), masking(SCHEDULE)
    other[..., 50, 3] = -torch.inf
    for bias in (other, masking(SCHEDULE).clamp(min=-1), masking(SCHEDULE).expand(2, 4, -1, -1), masking(SCHEDULE).mT):
        assert torch.equal(module(x, bias), original(x, bias))
    module.kv_caching(True)
    module(x[:, :5], None).sum().backward()
    module.kv_caching(False)
    module.train().attn_drop = 0.5
    module(x, masking(SCHEDULE))
    module.eval()
    with torch.autocast("cpu", torch.bfloat16):
        module(x, masking(SCHEDULE))
    assert len(calls) == 2 * 4 + 3  # the original of the comparison calls it too
    module(x, masking(SCHEDULE))
    assert len(calls) == 2 * 4 + 3
