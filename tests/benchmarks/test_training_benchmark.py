"""The benchmark of training: it compares losses and gradients, and times only what is right."""

import json

import pytest
import torch
from benchmark_cases import TINY

from aar.baselines.plain_aar import PlainAAR
from benchmarks import training
from benchmarks.common import random_aar

ARGUMENTS = ["--threads", "1", "--batch", "2", "--runs", "1", "--no-compile"]


def test_table_and_json(quick, tmp_path):
    assert training.main([*ARGUMENTS, "--autocast", "--json", str(tmp_path / "out.json")], TINY) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["shape"].split(", ")[-1] for row in rows] == ["fp32", "bf16 autocast"]
    for row in rows:
        assert set(row["times_ms"]) == set(row["extra_mib"]) == {"ours", "plain PyTorch"}
        assert all(times["p50"] > 0 for times in row["times_ms"].values())


def test_a_wrong_answer_is_not_timed(quick, monkeypatch, capsys):
    monkeypatch.setattr(training, "check", lambda *_: {"ours": "other"})
    timed = []
    monkeypatch.setattr(training, "interleaved", lambda variants, *_, **__: timed.extend(variants) or {})
    assert training.main(ARGUMENTS, TINY) == 1
    assert "WRONG ours: other; not timed" in capsys.readouterr().out
    assert timed == ["plain PyTorch"]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_wrong_loss_and_a_wrong_gradient_are_found(autocast):
    model = random_aar(TINY).eval()  # no condition is dropped
    plain = PlainAAR(model).forward

    def stops(condition, inputs):
        """Right logits, but the positions get half of their gradient."""
        position = model.position
        model.position = torch.nn.Parameter(position.detach())
        logits = 0.5 * plain(condition, inputs).detach() + 0.5 * plain(condition, inputs)
        model.position = position
        return logits

    forwards = {"ours": model, "plain PyTorch": plain, "louder": lambda *args: 1.1 * plain(*args), "stops": stops}
    found = training.check(model, forwards, autocast)
    assert set(found) == {"louder", "stops"}
    assert found["louder"].startswith("loss off by")
    assert found["stops"].startswith("gradients off by")
