"""What a training says, and to wandb: a recorder in its place."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from training_cases import sat_config

from aar.errors import AarError
from aar.training.config import LoggingConfig
from aar.training.logbook import Logbook

CONFIG = sat_config(logging=LoggingConfig(wandb="project"))


class Recorder:
    """wandb, as far as a training uses it."""

    class Error(Exception):
        pass

    def __init__(self):
        self.runs: list[SimpleNamespace] = []
        self.refuse = None

    def init(self, **options) -> Recorder:
        if self.refuse:
            raise Recorder.Error(self.refuse)
        self.runs.append(SimpleNamespace(options=options, logged=[], code=None))
        return self

    def log(self, values: dict, step: int) -> None:
        self.runs[-1].logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.runs[-1].code = exit_code

    Audio = staticmethod(lambda samples, rate: ("audio", samples.shape, rate))
    Image = staticmethod(lambda pixels: ("image", pixels.ndim, pixels.min() >= 0, pixels.max() <= 1))


@pytest.fixture
def wandb(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


def test_numbers_and_sounds_go_to_wandb(tmp_path, wandb):
    with Logbook(tmp_path / "run", CONFIG, 0, 24_000) as log:
        log.numbers(1, {"tokenizer/loss": 2.0})
        log.sounds(1, {"recorded": torch.randn(2000)})
    run = wandb.runs[0]
    assert run.options["project"] == "project"
    assert run.options["config"]["model"]["n_filters"] == 2
    sounds = {"recorded": ("audio", (2000,), 24_000), "recorded, spectrogram": ("image", 2, True, True)}
    assert run.logged == [(1, {"tokenizer/loss": 2.0}), (1, sounds)]
    assert run.code == 0


def test_a_resumed_training_is_the_same_run(tmp_path, wandb):
    for folder, start in (("a", 0), ("b", 0), ("a", 5), ("a", 0)):
        with Logbook(tmp_path / folder, CONFIG, start, 24_000):
            pass
    first, other, resumed, anew = (run.options["id"] for run in wandb.runs)
    assert first == resumed
    assert len({first, other, anew}) == 3
    assert all(run.options["resume"] == "allow" for run in wandb.runs)


def test_a_failed_training_is_a_failed_run(tmp_path, wandb):
    with pytest.raises(KeyError), Logbook(tmp_path, CONFIG, 0, 24_000):
        raise KeyError
    assert wandb.runs[0].code == 1


def test_wandb_missing_or_refusing_is_one_line(tmp_path, wandb, monkeypatch):
    wandb.refuse = "no API key\nsee the manual"
    with pytest.raises(AarError, match="logging.wandb: no API key$"):
        Logbook(tmp_path / "run", CONFIG, 0, 24_000)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(AarError, match="logging.wandb: .*pip install wandb"):
        Logbook(tmp_path / "missing", CONFIG, 0, 24_000)
    assert not (tmp_path / "missing").exists()
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_lines_of_steps_that_were_lost_are_removed(tmp_path):
    with Logbook(tmp_path, sat_config(), 0, 24_000) as log:
        for step in range(1, 6):
            log.numbers(step, {"loss": float(step)})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 6, "lo')
    with Logbook(tmp_path, sat_config(), 3, 24_000) as log:
        log.numbers(4, {"loss": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
