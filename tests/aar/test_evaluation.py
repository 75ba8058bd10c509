"""Metrics on signals whose distance is known, use of codes, and `aar evaluate`."""

from __future__ import annotations

import json
import math

import pytest
import torch
from small import TINY, noise

from aar import AAR, AARConfig, cli
from aar.audio import read_audio
from aar.conditions import AcousticEmbedding
from aar.evaluation import CodeCounts, ReconstructionMetrics, si_sdr, token_nll
from aar.evaluation.metrics import MelDistance, STFTDistance
from aar_kernels import ScaleSchedule

QUANTIZER = "lengths", "codebook_size", "latent_dim", "phi_kernel_sizes"


def transformer(condition_dim: int = AcousticEmbedding.dim) -> AAR:
    torch.manual_seed(0)
    sizes = {name: getattr(TINY, name) for name in QUANTIZER}
    model = AAR(AARConfig(depth=1, width=32, heads=1, condition_dim=condition_dim, **sizes))
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def test_si_sdr_by_hand():
    target = torch.tensor([1.0, -1.0, 1.0, -1.0])
    error = torch.tensor([1.0, 1.0, -1.0, -1.0])  # orthogonal to it
    assert si_sdr(target + 0.1 * error, target).item() == pytest.approx(20.0, abs=1e-5)
    assert si_sdr(-5 * (target + 0.1 * error) + 3, target).item() == pytest.approx(20.0, abs=1e-5)
    assert si_sdr(target, target).item() > 150
    assert si_sdr(error, target).item() == -math.inf
    assert si_sdr(target, torch.ones(4)).isnan()
    assert si_sdr(noise(2, 3, 100), noise(2, 3, 100, seed=2)).shape == (2, 3)


def test_mel_distance_of_a_gain_is_its_decibels():
    wave = 30 * noise(1, 8192)  # loud: no band is at the floor
    # Half the power is 3.01 dB; the shortest window has bands without a bin, always at the floor.
    full = MelDistance(windows=(512, 1024))(wave * 0.5**0.5, wave)
    assert full.item() == pytest.approx(math.log10(2), rel=1e-4)
    assert MelDistance()(wave, wave).item() == 0


def test_stft_distance_of_a_gain():
    wave = 30 * noise(1, 8192)
    expected = 0.5 + math.log(2)  # |theirs - ours| / |theirs|, and the difference of logarithms
    assert STFTDistance()(0.5 * wave, wave).item() == pytest.approx(expected, rel=1e-4)
    assert STFTDistance()(wave, wave).item() == 0


def test_metrics_worsen_with_noise_and_stand_short_waves():
    metrics, wave = ReconstructionMetrics(), 0.5 * noise(12000).cumsum(0) / 20
    values = [metrics(wave + level * noise(12000, seed=5), wave) for level in (0.001, 0.01, 0.1)]
    for name, direction in (("mel", 1), ("stft", 1), ("si_sdr", -1)):
        steps = [direction * value[name] for value in values]
        assert steps == sorted(steps)
    assert values[1]["si_sdr"] == pytest.approx(values[0]["si_sdr"] - 20, abs=0.5)
    assert all(math.isfinite(value) for value in metrics(wave[:100], wave[:100] + 0.1).values())


def test_code_counts():
    counts = CodeCounts(ScaleSchedule((1, 3)), 4)
    counts.update(torch.tensor([[2, 0, 1, 2], [2, 3, 0, 1]]))
    counts.update(torch.tensor([[2, 2, 3, 2]]))
    assert counts.counts.tolist() == [[0, 0, 3, 0], [2, 2, 3, 2]]
    assert counts.used.tolist() == [0.25, 1.0]
    p = torch.tensor([2, 2, 3, 2], dtype=torch.float64) / 9
    torch.testing.assert_close(counts.entropy, torch.stack([p[0] * 0, -(p * p.log2()).sum()]))
    uniform = CodeCounts(ScaleSchedule((4,)), 4)
    uniform.update(torch.tensor([[0, 1, 2, 3]]))
    assert uniform.entropy.tolist() == [2.0]


def test_token_nll_is_the_loss():
    model, codes = transformer(), torch.randint(0, 20, (3, 106), generator=torch.Generator().manual_seed(1))
    condition = AcousticEmbedding()(noise(3, 24000))
    nll = token_nll(model, condition, codes)
    assert nll.shape == (3, 106)
    torch.testing.assert_close(nll.mean(), model.loss(condition, codes).detach())
    logits = model(condition, codes)[1, 40].log_softmax(-1)
    torch.testing.assert_close(nll[1, 40], -logits[codes[1, 40]].detach())


@pytest.fixture
def evaluate(capsys, model_dir):
    def run(*args):
        code = cli.main(["evaluate", *map(str, args), "--model", str(model_dir), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("aar:")]

    return run


def test_command(evaluate, recording, tmp_path, model):
    paths = [recording("in/a.wav", 1.3), recording("in/sub/b.flac", 0.4, 44100)]
    transformer().set_quantizer(model.quantizer).save_pretrained(tmp_path / "aar")
    result = evaluate(tmp_path / "in", "--aar", tmp_path / "aar", "--json", tmp_path / "out.json")
    assert (result[0], result[2]) == (0, [])
    got = json.loads((tmp_path / "out.json").read_text())
    assert (got["recordings"], got["windows"], got["skipped"]) == (2, 3, 0)
    assert list(got["scales"]) == ["1", "4"]  # of 1, 5, 9, 13, 16 those that a model of four scales has, and all
    assert [file["label"] for file in got["files"]] == ["", "sub"]

    metrics, embedding = ReconstructionMetrics(), AcousticEmbedding()
    counts, nll, expected = CodeCounts(TINY.schedule, TINY.codebook_size), [], {"1": [], "4": []}
    for path in paths:
        wave = read_audio(path)
        codes = model.encode(wave[None, None])[0]
        counts.update(codes)
        for n, heard in zip((1, 4), model.reconstruct_scales(wave[None, None], [1, 4]), strict=True):
            expected[str(n)].append(metrics(heard[0, 0], wave))
        windows = model.windows().split(wave[None])[0]
        nll += [token_nll(AAR.from_pretrained(tmp_path / "aar"), embedding(w[None]), c[None])
                for w, c in zip(windows, codes, strict=True)]  # fmt: skip
    for n, values in expected.items():
        for name, value in got["scales"][n].items():
            assert value == pytest.approx(sum(v[name] for v in values) / 2, rel=1e-4, abs=1e-6)
    assert got["codes"]["used"] == counts.used.tolist()
    assert got["codes"]["entropy_bits"] == counts.entropy.tolist()
    assert got["nll"]["nats_per_token"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)
    assert got["nll"]["per_scale"][3] == pytest.approx(torch.cat(nll)[:, 31:].mean().item(), rel=1e-5)
    for number in (got["scales"]["4"]["mel"], got["nll"]["nats_per_token"]):
        assert f"{number:.3f}" in result[1]


def test_command_on_silence_and_broken_files(evaluate, recording, tmp_path):
    recording("in/a.wav", 0.5)
    path = tmp_path / "in" / "silent.wav"
    path.write_bytes(recording("b.wav", 0.3).read_bytes()[:44] + bytes(14400))
    (tmp_path / "in" / "broken.wav").write_bytes(b"no")
    code, out, errors = evaluate(tmp_path / "in", "--scales", "2,1", "--json", tmp_path / "out.json")
    assert code == 2
    assert len(errors) == 1
    assert "broken.wav: not audio" in errors[0]
    got = json.loads((tmp_path / "out.json").read_text())
    assert (got["recordings"], got["skipped"], list(got["scales"])) == (2, 1, ["1", "2"])
    by_name = {file["file"].rpartition("/")[2]: file["scales"]["1"] for file in got["files"]}
    assert by_name["silent.wav"]["si_sdr"] is None
    assert got["scales"]["1"]["si_sdr"] == by_name["a.wav"]["si_sdr"]


def test_command_errors(evaluate, recording, tmp_path, model):
    path = recording()
    transformer(64).set_quantizer(model.quantizer).save_pretrained(tmp_path / "other")
    for args, message in [
        ((path, "--scales", "5"), "--scales 5: the model has 4 scales"),
        ((path, "--aar", tmp_path / "other"), "conditioned on 64 numbers, the acoustic embedding has 192"),
        ((tmp_path / "none",), "no such file or folder"),
    ]:
        code, _, errors = evaluate(*args)
        assert (code, len(errors)) == (2, 1)
        assert message in errors[0]
    path.write_bytes(b"")
    code, _, errors = evaluate(path)
    assert (code, len(errors)) == (2, 2)
    assert "none of 1 recordings can be read" in errors[1]
