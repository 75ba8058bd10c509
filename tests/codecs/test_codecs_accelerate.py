"""`accelerate` and `restore` on whole models: what they change, what they do not, and what they say."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys

import pytest
import torch
from codec_cases import fill, make_plain, originals
from codec_packages import load
from torch import nn

import aar_kernels as ak
from aar_kernels import dispatch
from aar_kernels.codecs import plain
from aar_kernels.codecs.adapter import Adapter

pytestmark = pytest.mark.usefixtures("native")


def hf_encodec() -> nn.Module:
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    config = EncodecConfig(
        num_filters=2, num_lstm_layers=1, upsampling_ratios=[4, 2], hidden_size=16, codebook_dim=16, codebook_size=64,
        target_bandwidths=[18.0, 144.0],
    )  # fmt: skip
    return fill(EncodecModel(config).eval())


def hf_mimi() -> nn.Module:
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    config = MimiConfig(
        num_filters=2, upsampling_ratios=[4, 2], hidden_size=32, vector_quantization_hidden_dimension=16,
        codebook_dim=16, codebook_size=64, num_quantizers=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, intermediate_size=32, upsample_groups=32,
    )  # fmt: skip
    return fill(MimiModel(config).eval())


def encodec(rate: int) -> nn.Module:
    torch.manual_seed(0)
    load("encodec")
    from encodec import EncodecModel

    model = {24: EncodecModel.encodec_model_24khz, 48: EncodecModel.encodec_model_48khz}[rate](pretrained=False)
    model.set_target_bandwidth(6.0)
    return fill(model.eval())


def sound() -> torch.Tensor:
    """Loud enough that the encoders, whose weights are random, do not answer with silence."""
    return 30 * torch.randn(2, 1, 512, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("make", [hf_encodec, hf_mimi])
def test_whole_models_of_transformers(make):
    """Codes and sound before, with and after the replacement."""
    model, wav = make(), sound()
    before = model.encode(wav), model(wav)
    assert len(before[0].audio_codes.unique()) > 10  # else there would be little to compare
    report = ak.accelerate(model)
    assert len(report.replaced) == (4 if make is hf_mimi else 3)
    for _ in range(2):
        after = model.encode(wav), model(wav)
        assert torch.equal(before[0].audio_codes, after[0].audio_codes)
        torch.testing.assert_close(after[1].audio_values, before[1].audio_values, rtol=1e-4, atol=1e-4)
        ak.restore(model)


@torch.no_grad()
@pytest.mark.parametrize("rate", [24, 48])
def test_whole_models_of_encodec(rate):
    model = encodec(rate)
    wav = torch.randn(1, model.channels, rate * 100, generator=torch.Generator().manual_seed(0))
    frames, sound = model.encode(wav), model(wav)
    report = ak.accelerate(model)
    assert {entry.path for entry in report.replaced} == {"encoder", "decoder", "quantizer.vq"}
    assert not report.left
    for ours, theirs in zip(model.encode(wav), frames, strict=True):
        assert (ours[0] == theirs[0]).float().mean() > 0.99  # rounding decides a few, and what follows in their frames
    torch.testing.assert_close(model.decode(frames)[..., : wav.shape[-1]], sound, rtol=1e-4, atol=1e-5)


def test_restore_undoes_it_exactly():
    model = hf_mimi()
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    keys = list(model.state_dict())
    ak.accelerate(model)
    assert list(model.state_dict()) == keys
    assert any(isinstance(module, Adapter) for module in model.modules())
    ak.restore(model)
    for module, (cls, attributes) in zip(model.modules(), before, strict=True):
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
    ak.restore(model)  # of a model that has nothing to restore


def test_twice_is_once():
    model = hf_encodec()
    first = ak.accelerate(model)
    kept = type(model.quantizer)
    assert ak.accelerate(model) == first
    assert type(model.quantizer) is kept
    ak.accelerate(model, backend="reference")
    assert type(model.quantizer) is not kept
    ak.restore(model)
    assert not isinstance(model.quantizer, Adapter)


def test_one_class_serves_all_models():
    """So that many models, or one that is accelerated often, leave nothing behind."""
    a, b = hf_encodec(), hf_encodec()
    ak.accelerate(a)
    ak.accelerate(b)
    assert type(a.quantizer) is type(b.quantizer)


def embeddings(length: int = 20) -> torch.Tensor:
    return torch.randn(3, 16, length, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_copies_and_files():
    """A deep copy is accelerated and has weights of its own; a pickled module is of the original class."""
    model = hf_encodec()
    ak.accelerate(model)
    codes = model.quantizer.encode(embeddings())
    copied = copy.deepcopy(model)
    assert type(copied.quantizer) is type(model.quantizer)
    assert torch.equal(copied.quantizer.encode(embeddings()), codes)
    for layer in copied.quantizer.layers:
        layer.codebook.embed.neg_()
    assert not torch.equal(copied.quantizer.encode(embeddings()), codes)
    assert torch.equal(model.quantizer.encode(embeddings()), codes)

    file = io.BytesIO()
    torch.save(model.quantizer, file)  # PyTorch pickles no module with weight norm, as the rest of the model has
    file.seek(0)
    for loaded in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model.quantizer))):
        assert type(loaded).__name__ == "EncodecResidualVectorQuantizer"
        assert torch.equal(loaded.encode(embeddings()), codes)
    assert isinstance(model.quantizer, Adapter)


@torch.no_grad()
@pytest.mark.parametrize("make", [hf_encodec, hf_mimi])
def test_weights_are_read_live(make):
    """After `load_state_dict`, a write in place, another dtype and back, and a replaced tensor."""
    model, other, wav = make(), fill(make(), seed=1), sound()
    ak.accelerate(model)
    seen = [model.encode(wav).audio_codes]

    def now() -> torch.Tensor:
        codes = model.encode(wav).audio_codes
        fresh = make()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(codes, fresh.encode(wav).audio_codes)
        assert not torch.equal(codes, seen[-1])
        seen.append(codes)
        return codes

    model.load_state_dict(other.state_dict())
    now()
    for name, buffer in model.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            buffer.mul_(1.7)
    now()
    model.double().float()
    assert torch.equal(model.encode(wav).audio_codes, seen[-1])
    for module in model.modules():
        for name in {"embed", "embed_sum"} & module._buffers.keys():
            module._buffers[name] = -module._buffers[name]
    now()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_codebooks_are_packed_once(mode, monkeypatch):
    """However the model is called: what is made in inference mode has no version, and would be made at each call."""
    model = hf_encodec()
    ak.accelerate(model)
    packed, pack = [], torch.ops.aar_native.msrq_pack
    monkeypatch.setattr(torch.ops.aar_native, "msrq_pack", lambda *args: packed.append(1) or pack(*args))
    with mode():
        for bandwidth in (18.0, 144.0, 18.0):
            model.quantizer.decode(model.quantizer.encode(embeddings(), bandwidth))
    assert len(packed) == 1
    plain._codebooks.clear()


def test_a_model_made_in_inference_mode_is_the_packages():
    with torch.inference_mode():
        model = hf_encodec()
        ak.accelerate(model)
        codes = model.quantizer.encode(embeddings())
        ak.restore(model)
        assert torch.equal(model.quantizer.encode(embeddings()), codes)


@torch.no_grad()
def test_compiled():
    model = hf_encodec()
    expected = model.quantizer.encode(embeddings())
    ak.accelerate(model)

    def around(x):
        return model.quantizer.decode(model.quantizer.encode(x * 2)) + 1

    compiled = torch.compile(around, backend="eager")
    assert torch.equal(compiled(embeddings() / 2), model.quantizer.decode(expected) + 1)
    exported = torch.export.export(Encoder(model.quantizer), (embeddings(),), strict=False)
    assert torch.equal(exported.module()(embeddings()), expected)


class Encoder(nn.Module):
    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x):
        return self.quantizer.encode(x)


@torch.no_grad()
def test_threads():
    model = hf_encodec()
    ak.accelerate(model)
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        codes = model.quantizer.encode(embeddings(200))
        results.append((codes, model.quantizer.decode(codes)))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@torch.no_grad()
def test_a_backend_of_ones_own():
    model = hf_encodec()
    expected = model.quantizer.encode(embeddings())
    ak.accelerate(model, backend="reference")
    assert torch.equal(model.quantizer.encode(embeddings()), expected)
    ak.accelerate(model, backend="triton")
    with pytest.raises(ak.BackendError, match="triton"):
        model.quantizer.encode(embeddings())
    ak.accelerate(model)
    with ak.use_backend("triton"), pytest.raises(ak.BackendError, match="triton"):
        model.quantizer.encode(embeddings())
    with pytest.raises(ValueError, match="unknown backend"):
        ak.accelerate(model, backend="fastest")


# ------------------------------------------------------------------------------------------------------------------
# the report


def test_report():
    model = nn.ModuleDict({"codec": hf_mimi(), "other": nn.Linear(2, 2)})
    report = ak.accelerate(model)
    assert [entry.path for entry in report.replaced] == [
        "codec.encoder.encoder_seanet", "codec.decoder.decoder_seanet",
        "codec.quantizer.semantic_residual_vector_quantizer", "codec.quantizer.acoustic_residual_vector_quantizer"
    ]  # fmt: skip
    assert not report.left
    text = str(report)
    assert "codec.quantizer.acoustic_residual_vector_quantizer" in text
    assert "transformers.MimiResidualVectorQuantizer" in text
    assert "5 x 64 codes of 16 channels, euclidean" in text


def test_report_of_a_quantizer_itself():
    quantizer = hf_encodec().quantizer
    report = ak.accelerate(quantizer)
    assert [entry.path for entry in report.replaced] == [""]
    assert "(the model)" in str(report)
    assert isinstance(quantizer, Adapter)


def test_what_is_left_alone_and_why():
    vq = pytest.importorskip("vector_quantize_pytorch")

    class Changed(type(hf_encodec().quantizer)):
        pass

    changed = hf_encodec().quantizer
    changed.__class__ = Changed
    options = {"dim": 8, "num_quantizers": 2, "codebook_size": 16}
    model = nn.ModuleDict({
        "changed": changed,
        "affine": vq.ResidualVQ(**options, affine_param=True),
        "sizes": vq.ResidualVQ(dim=8, codebook_size=(8, 16)),
        "single": vq.VectorQuantize(dim=8, codebook_size=16),
        "fine": vq.ResidualVQ(**options),
    })  # fmt: skip
    report = ak.accelerate(model)
    assert [entry.path for entry in report.replaced] == ["fine"]
    reasons = {entry.path: entry.reason for entry in report.left}
    assert reasons.keys() == {"changed", "affine", "sizes", "single"}
    assert "subclass" in reasons["changed"]
    assert "affine parameters" in reasons["affine"]
    assert "differ in size" in reasons["sizes"]
    assert reasons["single"] == "unknown"
    assert type(changed) is Changed
    assert "left alone: it uses affine parameters" in str(report)


def test_another_version_of_a_package(monkeypatch):
    model = hf_encodec()
    cls = type(model.quantizer)
    monkeypatch.setattr(cls, "encode", lambda self, embeddings, bitrate: None)
    report = ak.accelerate(model)
    assert "quantizer" not in [entry.path for entry in report.replaced]
    assert "other arguments" in report.left[0].reason
    monkeypatch.undo()
    del model.quantizer.layers[0].codebook.embed
    report = ak.accelerate(model)
    assert [entry.path for entry in report.left] == ["quantizer"]
    assert "embed" in report.left[0].reason


def test_report_of_a_model_elsewhere():
    """The operators have not been measured on GPUs: there they run where they are asked for."""
    assert "on meta the operators run only if" in str(ak.accelerate(hf_encodec().to("meta")))
    assert "run only if" not in str(ak.accelerate(hf_encodec().to("meta"), backend="triton"))


def test_nothing_to_do():
    assert str(ak.accelerate(nn.Linear(2, 2))) == "no quantizer found"


@torch.no_grad()
def test_without_a_native_library(monkeypatch):
    """The packages' own code runs, and the report says so."""
    case = make_plain("transformers EnCodec", random.Random(0))
    original = originals(case.module)
    monkeypatch.setattr(dispatch, "operators", lambda: {"msrq_encode": {"native": "it was never built"}})
    assert "it was never built" in str(ak.accelerate(case.module))
    monkeypatch.setattr(dispatch, "select", lambda *_, **__: "reference")
    x = torch.randn(2, case.channels, 9)
    assert torch.equal(case.encode(case.module, x, 4), case.encode(original, x, 4))


def test_no_package_is_imported():
    script = (
        "import sys, torch, aar_kernels as ak; ak.accelerate(torch.nn.Linear(2, 2)); "
        "print([name for name in ('transformers', 'encodec', 'dac', 'snac', 'moshi', 'vector_quantize_pytorch') "
        "if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
