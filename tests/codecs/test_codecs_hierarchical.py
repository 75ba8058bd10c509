"""`HierarchicalVQ` of vector-quantize-pytorch gives the same results when it is accelerated."""

from __future__ import annotations

import random

import pytest
import torch
from codec_cases import originals, signature
from quantization.cases import Case, assert_codes

import aar_kernels as ak
from aar_kernels import ScaleSchedule
from aar_kernels.quantization import Levels

vector_quantize_pytorch = pytest.importorskip("vector_quantize_pytorch")


def pair(seed: int, **options):
    """A quantizer accelerated, and a copy as the package wrote it."""
    rng = random.Random(seed)
    lengths = sorted(rng.randint(1, 20) for _ in range(rng.randint(1, 6)))
    torch.manual_seed(seed)
    chosen = {
        "dim": rng.choice((8, 20)), "codebook_size": rng.choice((30, 64)), "shared_codebook": rng.random() < 0.5,
        "share_quant_resi": rng.choice((0, 1, 2, 4)), "quant_resi": rng.choice((0.5, 0.3, -0.8, 0.0)),
        "channel_first": rng.random() < 0.7, "kmeans_init": False,
    }  # fmt: skip
    module = vector_quantize_pytorch.HierarchicalVQ(scales=lengths, **chosen | options).eval()
    for name, buffer in module.named_buffers():
        if name.endswith("embed"):
            buffer.normal_().mul_(0.5)
    original = originals(module)
    report = ak.accelerate(module)
    assert len(report.replaced) == 1, report
    return module, original


def sequence(module, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(batch, length, module.dim, generator=torch.Generator().manual_seed(seed))
    return x.mT if module.channel_first else x


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_all_results(seed):
    module, original = pair(seed)
    rng = random.Random(seed)
    x = sequence(module, rng.randint(1, 8), rng.randint(1, 40), seed)
    ours, theirs = module(x), original(x)
    codes = torch.cat(ours[1], dim=1)
    assert isinstance(ours[1], tuple)
    assert [part.shape for part in ours[1]] == [part.shape for part in theirs[1]]
    if torch.equal(codes, torch.cat(theirs[1], dim=1)):
        torch.testing.assert_close(ours[0], theirs[0])
    books = [vq._codebook.embed[0] for vq in (original.vqs if original.vq is None else [original.vq])]
    if original.choose_phi(0).resi_ratio <= 1e-8:  # else `assert_codes` would have to know their phi
        levels = Levels(ScaleSchedule(n for (n,) in original.level_shapes), torch.stack(books))
        assert_codes(codes, Case(levels, x if module.channel_first else x.mT, None))
    else:
        assert torch.equal(codes, torch.cat(theirs[1], dim=1))
    assert ours[2] == theirs[2] == 0
    assert ours[2].shape == theirs[2].shape
    assert module(x, return_cutoff=True)[3] is None
    alone = torch.cat([torch.cat(module(item[None])[1], dim=1) for item in x])
    assert torch.equal(alone, codes)

    torch.testing.assert_close(module.get_output_from_indices(theirs[1]), original.get_output_from_indices(theirs[1]))
    dropped = [part.clone() for part in theirs[1]]
    dropped[0][:] = -1
    results = [each.get_output_from_indices(dropped, full_shape=33) for each in (module, original)]
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_masks(seed, monkeypatch):
    """Codes see the frames of the mask alone, and are -1 where there are none."""
    module, original = pair(seed)
    batch, length = 4, 5 + 3 * seed
    x = sequence(module, batch, length, seed)
    lens = torch.tensor([length, length // 2, 1, 0])
    prefix = torch.arange(length) < lens[:, None]
    holes = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.4
    results = [original(x, mask=prefix), original(x, mask=holes), original(x, lens=lens)]
    monkeypatch.setattr(type(module)._aar_original, "forward", lambda *_: pytest.fail("the original runs"))
    for theirs, options in zip(results, ({"mask": prefix}, {"mask": holes}, {"lens": lens}), strict=True):
        reconstruction, codes, loss = module(x, **options)
        assert all(torch.equal(a, b) for a, b in zip(codes, theirs[1], strict=True))
        torch.testing.assert_close(reconstruction, theirs[0])
        assert torch.equal(loss, theirs[2])


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_the_fused_operators_run(monkeypatch):
    module, _ = pair(0)

    def fail(*_):
        raise AssertionError("the original runs")

    for name in ("forward", "get_output_from_indices"):
        monkeypatch.setattr(type(module)._aar_original, name, fail)
    module.get_output_from_indices(module(sequence(module, 2, 10))[1])


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_what_is_the_originals():
    """NaN, also with a mask, codes outside the codebook, k-means."""
    module, original = pair(2, channel_first=True)
    x = sequence(module, 3, 12)
    x[0, 0, 0] = float("nan")
    mask = torch.ones(3, 12, dtype=torch.bool)
    for options in ({"mask": mask}, {"mask": mask.float()}):
        results = []
        for each in (module, original):
            try:
                results.append(each(x, **options)[1])
            except Exception as error:
                results.append([torch.tensor(ord(letter)) for letter in type(error).__name__])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(module(x)[1], original(x)[1], strict=True))
    codes = list(original(sequence(module, 3, 12))[1])
    codes[0][0, 0] = 10**6
    with pytest.raises(IndexError):
        original.get_output_from_indices(codes)
    with pytest.raises(IndexError):
        module.get_output_from_indices(codes)
    module, original = pair(2, kmeans_init=True, channel_first=True)
    for vq in (module, original):
        for name, buffer in vq.named_buffers():
            if name.endswith("initted"):
                buffer.fill_(False)
    results = []
    for each in (module, original):
        torch.manual_seed(0)
        results.append(each(sequence(module, 8, 12))[0])
    assert torch.equal(*results)


def test_training_is_the_originals():
    module, original = pair(1, threshold_ema_dead_code=2)
    results = []
    for each in (module.train(), original.train()):
        torch.manual_seed(0)
        x = sequence(each, 4, 16).contiguous().requires_grad_()
        quantized, _, loss = each(x)
        (quantized.square().mean() + loss).backward()
        results.append([quantized, loss, x.grad, *each.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("native")
def test_gradients_and_live_weights():
    """With gradients enabled the phi kernels get theirs from the original; without, they are read live."""
    module, original = pair(1, quant_resi=0.5)
    x = sequence(module, 2, 16)
    assert module(x)[0].requires_grad
    for change in (lambda m: m.choose_phi(0).conv.weight.mul_(-1), lambda m: m.get_vq(0)._codebook.embed.mul_(1.5)):
        with torch.no_grad():
            before = module(x)[0]
            change(module)
            change(original)
            after = module(x)[0]
            torch.testing.assert_close(after, original(x)[0])
            assert not torch.equal(after, before)


def test_signatures_and_report():
    module, original = pair(0)
    for name in ("forward", "get_output_from_indices"):
        assert signature(getattr(module, name)) == signature(getattr(original, name))
    options = {"dim": 8, "codebook_size": 16, "scales": (1, 2)}
    image = vector_quantize_pytorch.HierarchicalVQ(**options, accept_image_fmap=True)
    assert "2 spatial dimensions" in ak.accelerate(image).left[0].reason
    text = str(ak.accelerate(vector_quantize_pytorch.HierarchicalVQ(**options)))
    assert "16 codes of 8 channels at 1 2 tokens" in text
