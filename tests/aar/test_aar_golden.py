"""AAR against values that the public reference code computed on seeded random weights (depth 2, width 256), on the
tokenizer of `sat_small.pt`."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import aar_kernels as ak
from aar.checkpoints import aar_from_published, sat_from_published
from aar.checkpoints.transformer import published_name

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN / "aar_small_cos.pt", weights_only=True)


@pytest.fixture(scope="module")
def tokenizer(golden):
    """Codebooks of 1024 codes in which all but those that the golden generation picks are zero."""
    small = torch.load(GOLDEN / "sat_small.pt", weights_only=True)
    state, start = dict(small["state_dict"]), 0
    infer = golden["infer"]
    for s, n in enumerate(small["config"]["scales"]):
        book = f"quantizer.vq.layers.{s}._codebook."
        picks, rows = infer["picks"][0, start : start + n], infer["rows"][start : start + n]
        state[f"{book}embed"] = torch.zeros(1024, 64).index_copy(0, picks, rows)
        state[f"{book}embed_avg"], state[f"{book}cluster_size"] = torch.zeros(1024, 64), torch.ones(1024)
        start += n
    return sat_from_published(state, small["config"]["scales"])


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(golden, tokenizer, request):
    state = {f"module.{name}": tensor for name, tensor in golden["state_dict"].items()}
    return aar_from_published({"model_state_dict": state, "epoch": 1}, tokenizer).to(request.param)


def tolerance(golden, dtype) -> float:
    """The golden logits' own error, which was measured in making them; ours in float32 may err as much again."""
    return golden["fp32_vs_fp64_logits_max"] * (1.1 if dtype == torch.float64 else 3)


def test_teacher_forced_logits(model, golden):
    with torch.no_grad():
        logits = model(golden["label"], golden["inputs"].to(model.position.dtype))
    assert (logits[:, ::7] - golden["logits_every7"]).abs().max() <= tolerance(golden, logits.dtype)


def test_null_condition(model, golden):
    with torch.no_grad():
        logits = model(None, golden["inputs"][:1].to(model.position.dtype))
    assert (logits[:, ::8] - golden["uncond_logits_every8"]).abs().max() <= tolerance(golden, logits.dtype)


def test_loss_and_gradients(model, golden):
    model.zero_grad()
    logits = model(golden["label"], golden["inputs"].to(model.position.dtype))
    loss = F.cross_entropy(logits.flatten(0, 1), golden["targets"].flatten())
    assert abs(loss.item() - golden["loss"].item()) <= 4 * torch.finfo(torch.float32).eps * loss.item()
    loss.backward()
    gradients = {published_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    # The golden gradients are float32's; the largest relative error that they show against ours in float64 is 3.4e-5.
    for name, norm in golden["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    for name, value in golden["grads"].items():
        error = (gradients[name].reshape(value.shape) - value).norm() / value.norm()
        assert error <= 1e-4, name


def test_greedy_generation_with_guidance(model, tokenizer, golden):
    infer, reconstructions = golden["infer"], []
    codes = model.sample(
        infer["label"], cfg=infer["cfg"], temperature=0, scales_callback=lambda *after: reconstructions.append(after)
    )
    assert torch.equal(codes, infer["picks"])
    f_hat = reconstructions[-1][1]
    eps = torch.finfo(torch.float32).eps
    assert (f_hat.mT - infer["f_hat"]).abs().max() <= 16 * eps * infer["f_hat"].abs().max()
    inputs = model.quantizer.next_scale_inputs(codes)
    assert (inputs - infer["next_inputs"]).abs().max() <= 16 * eps * infer["next_inputs"].abs().max()
    wav = tokenizer.decode(codes[:, None])
    assert (wav - infer["wav"]).abs().max() <= 1e-5


def test_guided_logits_of_the_generation(model, golden, monkeypatch):
    infer, seen, draw = golden["infer"], [], ak.sampling.sample

    def recorded(logits, *, uncond, guidance, **options):
        seen.append(logits if uncond is None else (1 + guidance) * logits - guidance * uncond)
        return draw(logits, uncond=uncond, guidance=guidance, **options)

    monkeypatch.setattr(ak.sampling, "sample", recorded)
    model.sample(infer["label"], cfg=infer["cfg"], temperature=0)
    # Guidance 4 adds five times the error of the one and four times that of the other logits.
    bound = 9 * golden["teacher_forced_vs_cached_max"]
    assert (torch.cat(seen, dim=1)[:, ::4] - infer["logits_every4"]).abs().max() <= bound
