"""Configurations: those that ship are read, and what is wrong with one is said in a line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from training_cases import write_yaml

from aar import AAR, SAT, AARConfig, SATConfig
from aar.training.config import AARTraining, ConfigError, SATTraining, read_config
from aar.training.losses import LossWeights
from aar.training.optimization import WeightAverage, learning_rate_factor, optimizer_of

CONFIGS = Path(__file__).parents[2] / "configs"


def parameters(kind: type, *arguments) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in kind(*arguments).parameters())


def test_paper_configurations_are_the_papers():
    sat = read_config(SATTraining, CONFIGS / "paper-sat.yaml")
    assert sat.model == SATConfig()
    assert sat.losses == LossWeights(adversarial=3.0, feature_matching=3.0, wave=0.1, mel=1.0, commitment=1.0)
    assert (sat.optimizer.kind, sat.optimizer.betas, sat.optimizer.learning_rate) == ("adam", (0.5, 0.9), 3e-4)
    assert (sat.optimizer.clip, sat.discriminator.enabled, sat.discriminator.rest) == (1.0, True, 3)
    aar = read_config(AARTraining, CONFIGS / "paper-aar.yaml")
    assert AARConfig(**dataclasses.asdict(aar.model)) == AARConfig()
    assert (aar.optimizer.kind, aar.optimizer.betas, aar.optimizer.learning_rate) == ("adamw", (0.9, 0.95), 1e-4)
    assert (aar.optimizer.weight_decay, aar.optimizer.clip, aar.precision) == (0.05, 2.0, "bfloat16")
    assert (aar.model.condition_drop, aar.condition) == (0.1, "clap")


def test_small_configurations_are_small():
    sat = read_config(SATTraining, CONFIGS / "small-sat.yaml")
    assert 3e6 < parameters(SAT, sat.model) < 5e6
    aar = read_config(AARTraining, CONFIGS / "small-aar.yaml")
    assert 3e6 < parameters(AAR, AARConfig(**dataclasses.asdict(aar.model), condition_dim=192)) < 5e6


def test_overrides_lie_over_the_file(tmp_path):
    path = write_yaml(tmp_path / "a.yaml", seed=3, data={"source": "x", "batch_size": 2})
    config = read_config(
        SATTraining, path,
        ["data.batch_size=5", "optimizer.learning_rate=3e-4", "model.lengths=[1,2,4]", "data.cache=null"],
    )  # fmt: skip
    assert (config.seed, config.data.source, config.data.batch_size, config.data.cache) == (3, "x", 5, None)
    assert (config.optimizer.learning_rate, config.model.lengths) == (3e-4, (1, 2, 4))


def test_a_part_of_the_optimizer_leaves_the_others_as_they_are(tmp_path):
    path = write_yaml(tmp_path / "a.yaml", tokens="t", optimizer={"learning_rate": 5e-4})
    optimizer = read_config(AARTraining, path).optimizer
    assert (optimizer.kind, optimizer.betas, optimizer.learning_rate) == ("adamw", (0.9, 0.95), 5e-4)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lerning_rate=1", ["optimizer.lerning_rate: unknown key", "optimizer.learning_rate"]),
        ("lerning_rate=1", ["lerning_rate: unknown key", "optimizer.learning_rate"]),
        ("modle.dim=3", ["modle: unknown key", "model."]),
        ("data.batch_size=x", ["data.batch_size", "whole number", "'x'"]),
        ("data.batch_size=1.5", ["data.batch_size", "whole number", "1.5"]),
        ("data.batch_size=true", ["data.batch_size", "whole number", "True"]),
        ("data.batch_size=0", ["data.batch_size", "0"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "a number", "'fast'"]),
        ("optimizer.learning_rate=true", ["optimizer.learning_rate", "a number", "True"]),
        ("optimizer.betas=[0.5]", ["optimizer.betas", "list of 2"]),
        ("optimizer.kind=sgd", ["optimizer.kind", "adam, adamw"]),
        ("discriminator.enabled=1", ["discriminator.enabled", "true or false"]),
        ("model.lengths=[1,a]", ["model.lengths", "'a'"]),
        ("model.dim=0", ["model: dim must be at least 1"]),
        ("model=3", ["model: must hold settings of its own", "model.sample_rate"]),
        ("losses.mel=-1", ["losses", "mel", "-1"]),
        ("ema=1.0", ["ema", "below 1"]),
        ("seed", ["'seed'", "KEY=VALUE"]),
        ("data.source=[", ["data.source=[", "not YAML"]),
    ],
)
def test_errors_name_the_key_in_one_line(tmp_path, override, parts):
    path = write_yaml(tmp_path / "a.yaml", seed=1)
    with pytest.raises(ConfigError) as error:
        read_config(SATTraining, path, [override])
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_files_that_are_no_configuration(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="must hold settings"):
        read_config(SATTraining, tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="tokens is missing"):
        read_config(AARTraining, write_yaml(tmp_path / "b.yaml", seed=1))


def test_learning_rate_rises_then_falls():
    config = read_config(SATTraining, CONFIGS / "small-sat.yaml", ["schedule.steps=110", "schedule.warmup=10"]).schedule
    factors = [learning_rate_factor(step, config) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_only_matrices_decay():
    config = read_config(AARTraining, CONFIGS / "small-aar.yaml").optimizer
    layer = torch.nn.Linear(3, 2)
    matrices, vectors = optimizer_of(layer, config).param_groups
    assert [p is layer.weight for p in matrices["params"]] == [True]
    assert [p is layer.bias for p in vectors["params"]] == [True]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)


def test_average_of_weights():
    layer = torch.nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    average = WeightAverage(layer, 0.5)
    expected = layer.weight.item()
    for step in range(1, 11):
        layer.weight.data.fill_(step)
        average.update(layer, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weights["weight"].item() == pytest.approx(expected)
    assert average.weights.keys() == {"weight"}
