"""The transformer: shapes, training, sampling, and what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from small import TINY

import aar_kernels as ak
from aar import AAR, SAT, AARConfig
from aar.errors import CheckpointError

SMALL = AARConfig(
    depth=2, width=64, heads=2, condition_dim=24, lengths=(1, 3, 4, 9), codebook_size=40, latent_dim=8,
    phi_kernel_sizes=(3, 5),
)  # fmt: skip


def make(config: AARConfig = SMALL, seed: int = 0) -> AAR:
    """Random weights of a size at which every part matters: the initial ones make blocks near no-ops."""
    torch.manual_seed(seed)
    model = AAR(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("quantizer.") and parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


def conditions(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, SMALL.condition_dim, generator=torch.Generator().manual_seed(seed))


def codes(batch: int, seed: int = 2) -> torch.Tensor:
    shape = batch, SMALL.schedule.total
    return torch.randint(0, SMALL.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------
# the model


@pytest.mark.parametrize(("depth", "millions"), [(12, 131), (16, 308), (20, 598), (24, 1030)])
def test_published_sizes(depth, millions):
    with torch.device("meta"):
        model = AAR(AARConfig.of_depth(depth))
    trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("quantizer."))
    assert trained / 1e6 == pytest.approx(millions, abs=0.6)  # the paper's numbers count a few buffers too


def test_blocks_begin_near_the_identity():
    torch.manual_seed(0)
    model = AAR(SMALL)
    x = model(conditions(3), codes(3))
    assert x.std() < 0.05  # logits near equal: the loss begins at log(codebook_size)
    loss = model.loss(conditions(3), codes(3))
    assert loss.item() == pytest.approx(torch.tensor(40.0).log().item(), abs=0.05)
    assert all(torch.allclose(block.log_scale.exp(), torch.tensor(4.0)) for block in model.blocks)


def test_codes_and_their_inputs_are_the_same():
    model = make()
    inputs = model.quantizer.next_scale_inputs(codes(2))
    with torch.no_grad():
        assert torch.equal(model(conditions(2), codes(2)), model(conditions(2), inputs))


def test_a_scale_sees_itself_and_earlier_ones():
    """Logits of a scale come from the codes of earlier scales alone, and of all of them."""
    model = make().double()
    base = model(conditions(1), codes(1))
    for scale, part in enumerate(SMALL.schedule.slices()):
        changed = codes(1)
        changed[:, part] = (changed[:, part] + 1) % SMALL.codebook_size
        differs = (model(conditions(1), changed) != base).any(dim=2)[0]
        assert not differs[: part.stop].any()
        assert differs[part.stop :].all() or scale == SMALL.schedule.num_scales - 1


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = make(replace(SMALL, condition_drop=0.5)).train()
    model.loss(conditions(8), codes(8)).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("quantizer."):
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_gradients_of_all_backends_are_the_reference_gradients():
    losses, gradients = [], []
    for backend, dtype in ((None, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        model = make().to(dtype)
        with ak.use_backend(backend):
            loss = model.loss(conditions(3), codes(3))
            loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None})
    fast, plain, exact = gradients
    assert abs(losses[0] - losses[2]) <= 2 * abs(losses[1] - losses[2]) + 1e-6
    for name, value in exact.items():
        bound = 2 * ((plain[name] - value).norm() + torch.finfo(torch.float32).eps * value.norm() * 4)
        assert (fast[name] - value).norm() <= bound, name


def test_training_drops_conditions():
    model = make(replace(SMALL, condition_drop=1.0))
    with torch.no_grad():
        unconditional = model(None, codes(3))
        assert torch.equal(model.train()(conditions(3), codes(3)), unconditional)
        assert not torch.equal(model.eval()(conditions(3), codes(3)), unconditional)


def test_the_codebooks_stay_when_it_trains():
    model = make().train()
    assert not model.quantizer.training
    before = model.quantizer.codebooks.clone()
    model.loss(conditions(2), codes(2)).backward()
    assert torch.equal(model.quantizer.codebooks, before)


def test_autocast():
    model = make()
    exact = model(conditions(2), codes(2)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(conditions(2), codes(2))
        model.loss(conditions(2), codes(2)).backward()
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() <= 0.03 * exact.norm()


def test_plain_attention_instead_of_cosine():
    model = make(replace(SMALL, cosine_attention=False))
    assert model.blocks[0].log_scale is None
    model.loss(conditions(2), codes(2)).backward()
    assert model.sample(conditions(1)).shape == (1, SMALL.schedule.total)


def test_compiled():
    model = make()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(conditions(2), codes(2)), model(conditions(2), codes(2)))


def test_save_and_load(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = AAR.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.sample(conditions(1)), model.sample(conditions(1)))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError):
        AAR.from_pretrained(tmp_path)


def test_takes_the_quantizer_of_a_tokenizer():
    tokenizer = SAT(replace(TINY, lengths=SMALL.lengths, codebook_size=40, latent_dim=8))
    model = make().set_quantizer(tokenizer.quantizer)
    assert torch.equal(model.quantizer.codebooks, tokenizer.quantizer.codebooks)
    latents = torch.randn(2, TINY.dim, 9)
    found = tokenizer.quantizer.encode(latents)
    with torch.no_grad():
        inputs = tokenizer.quantizer.next_scale_inputs(found)
    assert torch.equal(model.quantizer.next_scale_inputs(found), inputs)
    with pytest.raises(ValueError, match="the tokenizer does not fit the model: lengths"):
        model.set_quantizer(SAT(TINY).quantizer)


# ------------------------------------------------------------------------------------------------------
# sampling


def picks_one_by_one(model: AAR, condition: torch.Tensor, cfg: float) -> torch.Tensor:
    """Greedy generation that runs the whole teacher-forced model for each scale, in the plainest way."""
    found = torch.zeros(len(condition), SMALL.schedule.total, dtype=torch.int64)
    for s, part in enumerate(SMALL.schedule.slices()):
        with torch.no_grad(), ak.use_backend("reference"):
            cond, uncond = model(condition, found)[:, part], model(None, found)[:, part]
        t = cfg * s / (SMALL.schedule.num_scales - 1)
        found[:, part] = ((1 + t) * cond - t * uncond).argmax(dim=-1)
    return found


@pytest.mark.parametrize("cfg", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("lengths", [(1, 3, 4, 9), (2, 2, 5)])
def test_cached_generation_is_the_teacher_forced_one(cfg, lengths, monkeypatch):
    config = replace(SMALL, lengths=lengths)
    monkeypatch.setitem(globals(), "SMALL", config)
    model = make(config).double()
    expected = picks_one_by_one(model, conditions(3).double(), cfg)
    assert torch.equal(model.sample(conditions(3).double(), cfg=cfg, temperature=0), expected)
    assert torch.equal(make(config).sample(conditions(3), cfg=cfg, temperature=0), expected)


def test_an_item_does_not_depend_on_its_batch():
    model = make()
    seeds = [5, 77, 3]
    together = model.sample(conditions(3), seed=seeds)
    for i, seed in enumerate(seeds):
        assert torch.equal(model.sample(conditions(3)[i : i + 1], seed=seed)[0], together[i])
    assert torch.equal(model.sample(conditions(3), seed=10), model.sample(conditions(3), seed=[10, 11, 12]))
    assert torch.equal(model.sample(conditions(3), seed=torch.tensor(seeds)), together)
    assert not torch.equal(model.sample(conditions(3), seed=[5, 77, 4])[2], together[2])


def test_threads_do_not_matter():
    model = make()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(model.sample(conditions(2), seed=1))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


def test_unconditional():
    model = make()
    found = model.sample(num=3)
    assert found.shape == (3, SMALL.schedule.total)
    null = model.null_condition.detach().expand(3, -1)
    assert torch.equal(found, model.sample(null, cfg=0))
    assert model.sample().shape == (1, SMALL.schedule.total)
    assert model.sample(num=0).shape == (0, SMALL.schedule.total)


def test_callback_sees_every_scale():
    model, seen = make(), []
    found = model.sample(conditions(2), scales_callback=lambda *after: seen.append(after))
    assert [scale for scale, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(torch.cat([picks for _, _, picks in seen], dim=1), found)
    expected = model.quantizer.decode_scales(found)
    for scale, f_hat, _ in seen:
        torch.testing.assert_close(f_hat.mT, expected[scale])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.int8, 0.03)])
def test_narrow_weights_change_logits_little(dtype, bound, monkeypatch):
    model, draw, seen = make(), ak.sampling.sample, []

    def recorded(logits, **options):
        seen.append(logits)
        return draw(logits, **options)

    monkeypatch.setattr(ak.sampling, "sample", recorded)
    model.sample(conditions(4), cfg=0, temperature=0)
    model.sample(conditions(4), cfg=0, temperature=0, dtype=dtype)
    exact, narrow = seen[0], seen[SMALL.schedule.num_scales]  # the first scale: later ones see other codes
    assert 0 < (narrow - exact).norm() <= bound * exact.norm()


def test_changed_weights_are_seen():
    model = make()
    before = model.sample(conditions(2), temperature=0)
    other = make(seed=9)
    with torch.no_grad():
        for own, new in zip(model.parameters(), other.parameters(), strict=True):
            own.copy_(new)
    after = model.sample(conditions(2), temperature=0)
    assert not torch.equal(after, before)
    model.quantizer.load_state_dict(other.quantizer.state_dict())
    assert torch.equal(model.sample(conditions(2), temperature=0), other.sample(conditions(2), temperature=0))


def test_packed_weights_die_with_the_model():
    from aar.models import generation

    model = make()
    model.sample()
    held, alive = len(generation._engines), weakref.ref(model)
    copy.deepcopy(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(generation._engines) == held - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg": -0.1}, "cfg must be at least 0"),
        ({"cfg": float("nan")}, "cfg must be at least 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": -1.0}, "temperature"),
        ({"seed": [1, 2, 3]}, "2 items need as many seeds, got 3"),
        ({"num": 3}, "num is 3, but there are 2 conditions"),
        ({"dtype": torch.int64}, "floating dtype, int8 or float8_e4m3fn"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make().sample(conditions(2), **options)


def test_bad_tensors():
    model = make()
    with pytest.raises(ValueError, match=r"condition must be floating point \[2, 24\], got torch.float32 \[2, 25\]"):
        model.sample(torch.zeros(2, 25))
    with pytest.raises(ValueError, match=r"condition must be floating point \[3, 24\]"):
        model(conditions(2), codes(3))
    with pytest.raises(ValueError, match=r"tokens must be codes \[B, 17\] or inputs \[B, 16, 8\], got \[2, 3, 4\]"):
        model(conditions(2), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="codes must be int64"):
        model(conditions(2), codes(2)[:, 1:])
    with pytest.raises(RuntimeError, match="codes must be in"):
        model(conditions(2), codes(2) + SMALL.codebook_size)


def test_nan_is_an_error_not_a_code():
    with pytest.raises(RuntimeError, match="(?i)nan"):
        make().sample(torch.full((1, SMALL.condition_dim), float("nan")))


@pytest.mark.parametrize("sizes", [{"depth": 0}, {"width": 65}, {"condition_drop": 1.5}])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="at least 1|do not divide|within"):
        replace(SMALL, **sizes)
