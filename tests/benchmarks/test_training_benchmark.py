"""The benchmark of training: it compares losses and gradients, and times only what is right."""

import json
from dataclasses import replace

import pytest
import torch
from benchmark_cases import TINY
from torch.utils.flop_counter import FlopCounterMode

from aar import SAT, SATConfig
from aar.training.config import DiscriminatorConfig, SATTraining
from aar_kernels import dispatch
from benchmarks import training, training_steps
from benchmarks.common import random_aar
from benchmarks.roofline import tokenizer_training_flops
from benchmarks.training_steps import PLAIN, AARSteps, SATSteps

ARGUMENTS = ["--threads", "1", "--batch", "2", "--runs", "1", "--no-compile"]
TINY_SAT = SATTraining(
    model=SATConfig(
        n_filters=4, dim=12, latent_dim=6, lengths=(1, 3, 6, 12), codebook_size=16, phi_kernel_sizes=(3, 5),
        lstm_layers=1,
    ),
    discriminator=DiscriminatorConfig(filters=2),
    initial_loudness=0.2,
)  # fmt: skip


@pytest.mark.parametrize("config", [TINY, TINY_SAT], ids=["AAR", "SAT"])
def test_table_and_json(quick, tmp_path, config):
    assert training.main([*ARGUMENTS, "--autocast", "--json", str(tmp_path / "out.json")], config) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["shape"].split(", ")[-1] for row in rows] == ["fp32", "bf16 autocast"]
    for row in rows:
        assert set(row["times_ms"]) == set(row["extra_mib"]) == {"ours", PLAIN}
        assert all(times["p50"] > 0 for times in row["times_ms"].values())


def test_the_autoencoder_alone(quick, tmp_path):
    path = tmp_path / "out.json"
    assert training.main([*ARGUMENTS, "--autoencoder", "--json", str(path)], TINY_SAT) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["shape"].startswith("SAT's autoencoder")
    assert row["flops"] < tokenizer_training_flops(SAT(TINY_SAT.model), 2)


@pytest.mark.parametrize("config", [TINY, TINY_SAT], ids=["AAR", "SAT"])
def test_a_wrong_answer_is_not_timed(quick, monkeypatch, capsys, config):
    monkeypatch.setattr(training, "check", lambda *_: {"ours": "other"})
    timed = []
    monkeypatch.setattr(training, "interleaved", lambda variants, *_, **__: timed.extend(variants) or {})
    assert training.main(ARGUMENTS, config) == 1
    assert "WRONG ours: other; not timed" in capsys.readouterr().out
    assert timed == [PLAIN]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_wrong_loss_and_a_wrong_gradient_are_found(autocast):
    model = random_aar(TINY).eval()  # no condition is dropped
    steps = AARSteps(model)
    plain = steps.forwards[PLAIN]

    def stops(condition, inputs):
        """Right logits, but the positions get half of their gradient."""
        position = model.position
        model.position = torch.nn.Parameter(position.detach())
        logits = 0.5 * plain(condition, inputs).detach() + 0.5 * plain(condition, inputs)
        model.position = position
        return logits

    steps.forwards |= {"louder": lambda *args: 1.1 * plain(*args), "stops": stops}
    steps.models = dict.fromkeys(steps.forwards, model)
    found = training.check(steps, autocast)
    assert set(found) == {"louder", "stops"}
    assert found["louder"].startswith("loss off by")
    assert found["stops"].startswith("gradients off by")


def test_a_wrong_operator_of_the_tokenizer_is_found(monkeypatch):
    config = replace(TINY_SAT, discriminator=DiscriminatorConfig(enabled=False))
    steps = SATSteps(config)
    assert training.check(steps, autocast=False) == {}
    quantizer, forward = steps.models["ours"].quantizer, steps.models["ours"].quantizer.forward
    monkeypatch.setattr(quantizer, "forward", lambda x: (lambda y, *rest: (1.001 * y, *rest))(*forward(x)))
    assert training.check(steps, autocast=False)["ours"].startswith(("loss off by", "gradients off by"))


def test_the_plain_tokenizer_runs_the_reference(monkeypatch):
    forced = []
    task = training_steps.SATTask
    losses = task.losses

    def watched(*args, **kwargs):
        forced.append(dispatch._forced)
        return losses(*args, **kwargs)

    monkeypatch.setattr(task, "losses", watched)
    steps = SATSteps(TINY_SAT)
    for name in steps.models:
        steps.step(name, 1, autocast=False)()
    assert forced == [None, "reference"]


def test_operations_of_a_tokenizer():
    """As PyTorch counts them, which leaves out two LSTMs of 64 channels; and the search for 22 codes of 6 channels."""
    model = SATSteps(TINY_SAT).models["ours"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.decoder(model.encoder(torch.zeros(1, 1, model.config.window_samples)))
    lstm, search = 2 * 12 * 4 * 64 * (64 + 64), 2 * 22 * 16 * 6
    assert tokenizer_training_flops(model, 2) == 2 * (3 * (counter.get_total_flops() + 2 * lstm) + search)
