import json

import pytest
import safetensors.torch
import torch
from small import TINY, files_under, noise, tiny_sat

from aar import SAT, SATConfig
from aar.errors import CheckpointError
from aar.models import sat
from aar.training.initialization import initialize_tokenizer

LENGTHS = [1, 319, 320, 23999, 24000, 24001, 60000]


@pytest.mark.parametrize("overlap", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("num_samples", LENGTHS)
def test_any_length_comes_back_at_its_length(model, num_samples, overlap):
    codes = model.encode(noise(1, 1, num_samples), overlap)
    hop = 24000 - round(overlap * 24000)
    assert codes.shape == (1, 1 + max(0, -(-(num_samples - 24000) // hop)), 106)
    assert codes.dtype == torch.int64
    assert model.decode(codes, num_samples, overlap).shape == (1, 1, num_samples)
    assert model.decode(codes, overlap=overlap).shape == (1, 1, 24000 + (codes.shape[1] - 1) * hop)


def test_published_sizes():
    config = SATConfig()
    assert (config.window_samples, config.schedule.total) == (24000, 455)
    with torch.device("meta"):
        big = SAT.__new__(SAT)
        torch.nn.Module.__init__(big)
        big.encoder = sat.seanet_encoder(1024, 32, (8, 5, 4, 2), 2, weight_norm=True)
        big.decoder = sat.seanet_decoder(1024, 32, (8, 5, 4, 2), 2, weight_norm=True)
    quantizer = 2 * 1024 * 64 + 64 + 1024 + 6 * (64 * 64 * 9 + 64)
    assert round((sum(p.numel() for p in big.parameters()) + quantizer) / 1e6, 1) == 21.6


def test_windows_are_coded_one_by_one(model):
    """Whatever the batch: each window's codes and wave are those of the window alone, cross-faded."""
    overlap, ramp = 0.1, (torch.arange(2400) + 0.5) / 2400
    hop = 21600
    wav = noise(2, 1, 24000 + 9 * hop - 5)
    assert 2 * 10 > sat.WINDOWS_PER_BATCH
    codes = model.encode(wav, overlap)
    out = model.decode(codes, wav.shape[-1], overlap)
    padded = torch.nn.functional.pad(wav, (0, 5))
    for b in range(2):
        alone = [model.encode(padded[b : b + 1, :, w * hop : w * hop + 24000]) for w in range(10)]
        assert torch.equal(codes[b], torch.cat(alone)[:, 0])
        waves = [model.decode(code)[0, 0] for code in alone]
        for w in range(9):
            start = (w + 1) * hop
            seam = (1 - ramp) * waves[w][hop:] + ramp * waves[w + 1][:2400]
            torch.testing.assert_close(out[b, 0, start : start + 2400], seam, rtol=1e-4, atol=1e-6)
            middle = waves[w][2400 if w else 0 : hop]
            torch.testing.assert_close(out[b, 0, start - len(middle) : start], middle, rtol=1e-4, atol=1e-6)


def test_scales(model):
    wav = noise(1, 1, 30000)
    every = model.reconstruct_scales(wav)
    assert every.shape == (4, 1, 1, 30000)
    torch.testing.assert_close(every[-1], model.reconstruct(wav), rtol=1e-4, atol=1e-6)
    some = model.reconstruct_scales(wav, [3, 1])
    torch.testing.assert_close(some, every[[2, 0]], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(every[0], every[1], rtol=1e-4, atol=1e-6)


def test_progress_counts_every_window_once(model):
    seen = []
    codes = model.encode(noise(1, 1, 24000 * 11), progress=seen.append)
    assert sum(seen) == 11
    assert len(seen) > 1
    model.decode(codes, progress=seen.append)
    assert sum(seen) == 22


def test_training_pass_learns_and_updates_codebooks():
    model = tiny_sat().train()
    wav = noise(2, 1, 24000)
    before = model.quantizer.codebooks.clone()
    out, codes, loss = model(wav)
    assert out.shape == wav.shape
    assert codes.shape == (2, 106)
    assert loss.shape == ()
    ((out - wav).square().mean() + loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder.model[0].conv.conv.parametrizations.weight.original1.grad.any()
    assert not torch.equal(model.quantizer.codebooks, before)


def test_inference_changes_nothing_and_builds_no_graph():
    model = tiny_sat().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not model.reconstruct(noise(1, 1, 100)).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weight_norm_is_never_stale():
    model, wav = tiny_sat(), noise(1, 1, 24000)
    codes = model.encode(wav)
    first = model.decode(codes)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1.5)
    second = model.decode(codes)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(model.fold_weight_norm().decode(codes), second, rtol=1e-4, atol=1e-6)
    assert not model.config.weight_norm


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (torch.zeros(24000), "must be"),
        (torch.zeros(1, 24000), "must be"),
        (torch.zeros(1, 2, 24000), "must be"),
        (torch.zeros(1, 1, 0), "at least 1"),
        (torch.zeros(0, 1, 100), "at least 1"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), "floating point"),
        (torch.full((1, 1, 100), torch.nan), "NaN"),
        (torch.full((1, 1, 100), torch.inf), "NaN or infinite"),
    ],
)
def test_waves_that_cannot_be_encoded(model, wav, message):
    with pytest.raises(ValueError, match=message):
        model.encode(wav)


def test_other_wrong_arguments(model):
    codes = model.encode(noise(1, 1, 24001))
    for wrong in (codes[0], codes[..., :-1], codes.int(), codes[:, :0]):
        with pytest.raises(ValueError, match="codes must be"):
            model.decode(wrong)
    for num_samples in (0, -1, 24000, 48001):
        with pytest.raises(ValueError, match="do not take 2 windows"):
            model.decode(codes, num_samples)
    for outside in (-2, 20):
        with pytest.raises(RuntimeError, match="codes"):
            model.decode(torch.full_like(codes, outside))
    for scales in ([], [0], [5]):
        with pytest.raises(ValueError, match="1 to 4"):
            model.decode_scales(codes, scales)
    with pytest.raises(ValueError, match="half a window"):
        model.encode(noise(1, 1, 10), overlap=0.6)
    with pytest.raises(ValueError, match="24000"):
        model(noise(1, 1, 23999))
    for name, size in {"dim": 0, "ratios": (), "lengths": (1, 3)}.items():
        with pytest.raises(ValueError, match=name):
            SATConfig(**{name: size})


@pytest.mark.parametrize("folded", [False, True])
def test_saved_and_loaded(tmp_path, folded):
    model, wav = tiny_sat(), noise(1, 1, 30000)
    if folded:
        model.fold_weight_norm()
    model.save_pretrained(tmp_path / "new" / "folder")
    assert files_under(tmp_path) == ["new/folder/config.json", "new/folder/model.safetensors"]
    loaded = SAT.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.fingerprint() == model.fingerprint() != tiny_sat(1).fingerprint()
    assert torch.equal(loaded.reconstruct(wav), model.reconstruct(wav))


def test_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    tiny_sat(0).save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files_under(tmp_path)}

    def half_written(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        tiny_sat(1).save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files_under(tmp_path)} == before


def test_loading_says_all_that_is_wrong(tmp_path):
    model = tiny_sat()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    bias = state.pop("encoder.model.0.conv.conv.bias")
    state |= {"new": bias, "quantizer.codebooks": state["quantizer.codebooks"][:, :-1].contiguous()}
    safetensors.torch.save_file(state, weights)
    with pytest.raises(CheckpointError) as caught:
        SAT.from_pretrained(tmp_path)
    assert caught.value.missing == ("encoder.model.0.conv.conv.bias",)
    assert caught.value.unexpected == ("new",)
    assert caught.value.misshaped == {"quantizer.codebooks": ((4, 20, 6), (4, 19, 6))}


@pytest.mark.parametrize(
    "damage",
    ["no weights", "no config", "cut", "not json", "unknown", "impossible", "no such metric", "a list"],
)
def test_damaged_folders(tmp_path, damage):
    tiny_sat().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        values = json.loads(config.read_text())
        text = {
            "not json": "{",
            "unknown": json.dumps(values | {"colour": 1}),
            "impossible": json.dumps(values | {"lengths": [1, 3]}),
            "no such metric": json.dumps(values | {"metric": "taste"}),
            "a list": "[]",
        }[damage]
        config.write_text(text)
    with pytest.raises(CheckpointError, match="is not a saved model") as caught:
        SAT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_config_survives_json():
    assert SATConfig.from_dict(json.loads(json.dumps(TINY.__dict__))) == TINY


def test_fresh_model_lets_the_signal_through():
    torch.manual_seed(0)
    tokenizer = SAT(SATConfig(n_filters=8, dim=128))
    initialize_tokenizer(tokenizer, 0.2)
    latents = tokenizer.encoder(0.3 * torch.randn(2, 1, 24_000))
    assert (latents - latents.mean((0, 2), keepdim=True)).std() > 0.1


def test_half_precision_on_disk(tmp_path, model):
    model.save_pretrained(tmp_path / "half", torch.float16)
    model.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    half = SAT.from_pretrained(tmp_path / "half")
    for ours, theirs in zip(half.state_dict().values(), model.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype
        expected = theirs.to(torch.float16).to(theirs) if theirs.is_floating_point() else theirs
        assert torch.equal(ours, expected)


def test_half_precision_that_would_overflow_is_refused(tmp_path):
    tokenizer = tiny_sat()
    tokenizer.quantizer.embed_avg.fill_(1e6)
    with pytest.raises(ValueError, match=r"quantizer\.embed_avg"):
        tokenizer.save_pretrained(tmp_path, torch.float16)
    assert not list(tmp_path.iterdir())
