"""`aar train-sat`, `aar tokenize`, `aar train-aar` on a folder of recordings."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_cases import AAR_YAML, SAT_YAML, tiny_sat, write_recordings, write_yaml

from aar import AAR, SAT, cli
from aar.audio import read_audio
from aar.conditions import AcousticEmbedding
from aar.training import tokens
from aar.training.tokens import TokenSet
from aar.training.world import World


@pytest.fixture
def aar(capsys):
    """Runs `aar ARGS` on the CPU; returns the exit code and the lines on stderr that are errors."""

    def run(*args):
        code = cli.main([*map(str, args), "--device", "cpu"])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("aar: ")]

    return run


@pytest.fixture
def recordings(tmp_path) -> Path:
    return write_recordings(tmp_path / "wav", count=5)


@pytest.fixture
def model(tmp_path) -> Path:
    tiny_sat().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_from_recordings_to_new_sounds(aar, tmp_path, recordings):
    sat, transformer = tmp_path / "sat", tmp_path / "aar"
    config = write_yaml(tmp_path / "sat.yaml", **SAT_YAML)
    data = [f"data.source={recordings}", f"data.held_out={recordings / '3.wav'}", "logging.held_out_every=3"]
    assert aar("train-sat", config, *data, "discriminator.enabled=false", "--out", sat) == (0, [])
    assert len(list((sat / "tensorboard").iterdir())) == 1
    metrics = [json.loads(line) for line in (sat / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in metrics] == [1, 2, 3, 4, 5, 6]
    named = {"tokenizer/loss", "tokenizer/mel", "learning rate", "codes in use", "seconds per second"}
    assert named < metrics[0].keys()
    tried = {each["step"]: each["held out/mel"] for each in metrics if "held out/mel" in each}
    assert tried.keys() == {3, 6}
    assert tried[6] != tried[3]
    assert aar("reconstruct", recordings / "0.wav", tmp_path / "heard.wav", "--model", sat / "model") == (0, [])

    assert aar("tokenize", recordings, tmp_path / "tokens", "--model", sat / "model") == (0, [])
    config = write_yaml(tmp_path / "aar.yaml", **AAR_YAML)
    data = [f"tokens={tmp_path / 'tokens'}", f"data.held_out={tmp_path / 'tokens'}", "logging.held_out_every=2"]
    assert aar("train-aar", config, *data, "--out", transformer) == (0, [])
    metrics = [json.loads(line) for line in (transformer / "metrics.jsonl").read_text().splitlines()]
    assert ["held out/loss" in each for each in metrics] == [False, True] * 2
    assert AAR.from_pretrained(transformer / "model").config.condition_dim == AcousticEmbedding.dim
    made = ["sample", tmp_path / "made", "--model", transformer / "model", "--tokenizer", sat / "model"]
    assert aar(*made, "--unconditional") == (0, [])
    assert read_audio(tmp_path / "made" / "000.wav").isfinite().all()

    # On the fly, and on from there.
    config = write_yaml(tmp_path / "fly.yaml", **AAR_YAML, tokenizer=str(sat / "model"))
    fly = ["train-aar", config, f"data.source={recordings}", "--out", tmp_path / "fly"]
    assert aar(*fly[:3], "schedule.steps=2", *fly[3:]) == (0, [])
    code, errors = aar(*fly)
    assert (code, len(errors)) == (2, 1)
    assert "--resume" in errors[0]
    assert aar(*fly, "--resume") == (0, [])
    metrics = [json.loads(line)["step"] for line in (tmp_path / "fly" / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "arguments",
    [
        ("CONFIG", "seed=1", "ema=0.5", "--out", "OUT"),
        ("CONFIG", "--out", "OUT", "seed=1", "ema=0.5"),
        ("--out", "OUT", "CONFIG", "seed=1", "--resume", "ema=0.5"),
        ("--out=OUT", "CONFIG", "--device", "cpu", "seed=3", "ema=0.5", "--resume", "seed=1"),
    ],
)
def test_settings_and_options_in_any_order(monkeypatch, arguments):
    taken = []
    monkeypatch.setattr("aar.cli.training.train", taken.append)
    assert cli.main(["train-sat", *arguments]) == 0
    assert (taken[0].config, taken[0].out) == (Path("CONFIG"), Path("OUT"))
    settings = dict(override.split("=") for override in taken[0].overrides)
    assert settings == {"seed": "1", "ema": "0.5"}


@pytest.mark.parametrize("arguments", [("train-sat", "CONFIG", "--out", "OUT", "--no-such=1"), ("info", "a", "b=1")])
def test_other_arguments_are_not_settings(capsys, arguments):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


def test_tensorboard_has_sounds_and_pictures(aar, tmp_path, recordings):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = write_yaml(tmp_path / "sat.yaml", **SAT_YAML)
    run = ["train-sat", config, f"data.source={recordings}", "discriminator.enabled=false", "schedule.steps=3"]
    assert aar(*run, "--out", tmp_path / "run") == (0, [])
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    names = {"recorded", "2 scales", "4 scales"}
    assert (set(events.Tags()["audio"]), set(events.Tags()["images"])) == (names, names)
    assert len(events.Scalars("tokenizer/loss")) == 3


def test_training_from_tokens_is_training_on_the_fly(tmp_path, recordings, model):
    """Tokens and conditions are those of the windows of each recording."""
    sat = SAT.from_pretrained(model)
    tokens.tokenize(recordings, tmp_path / "out", sat, World(), condition="acoustic", clap="")
    made = TokenSet(tmp_path / "out")
    assert len(made) == 5 * 4  # 0.6 s in windows of 0.16 s
    wave = read_audio(recordings / "1.wav")[None]
    windows = sat.windows().split(wave)[0]
    torch.testing.assert_close(made.codes[4:8].long(), sat.encode(wave[None])[0])
    torch.testing.assert_close(made.conditions[4:8], AcousticEmbedding(24_000)(windows))


def test_batches_of_tokens(tmp_path, recordings, model):
    tokens.tokenize(recordings, tmp_path / "out", SAT.from_pretrained(model), World(), condition="none", clap="")
    made = TokenSet(tmp_path / "out")
    made.codes = torch.arange(len(made))[:, None]

    def taken(count: int, size: int, world: World | None = None, start: int = 0) -> list[int]:
        batches = made.batches(size, seed=1, world=world or World(), start=start)
        return torch.cat([next(batches)["codes"] for _ in range(count)]).flatten().tolist()

    whole = taken(10, 6)
    assert [sorted(whole[i : i + 20]) for i in (0, 20, 40)] == [list(range(20))] * 3
    assert whole[:20] != whole[20:40]
    assert taken(3, 6, start=7) == whole[42:]
    ranks = [taken(10, 3, World(rank=rank, size=2)) for rank in range(2)]
    assert [x for i in range(10) for rank in ranks for x in rank[3 * i : 3 * i + 3]] == whole


def test_tokenizing_goes_on_where_it_was_stopped(aar, tmp_path, recordings, model, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["--model", model, "--per-shard", 2]
    assert aar("tokenize", recordings, whole, *arguments) == (0, [])

    read, calls = tokens.read_recording, []

    def interrupted(recording, rate):
        calls.append(recording.path.stem)
        if recording.path.stem == "3" and calls.count("3") == 1:
            raise KeyboardInterrupt
        return read(recording, rate)

    monkeypatch.setattr(tokens, "read_recording", interrupted)
    assert aar("tokenize", recordings, stopped, *arguments)[0] == 130
    assert sorted(path.name for path in stopped.glob("*shard*")) == ["shard-00000.safetensors"]
    config = write_yaml(tmp_path / "aar.yaml", **AAR_YAML)
    code, errors = aar("train-aar", config, f"tokens={stopped}", "--out", tmp_path / "run")
    assert code == 2
    assert "2 of 3 shards are missing" in errors[0]

    calls[:] = ["3"]
    assert aar("tokenize", recordings, stopped, *arguments) == (0, [])
    assert sorted(calls[1:]) == ["2", "3", "4"]  # the first shard was not made again
    for path in whole.glob("shard*"):
        ours, theirs = (safetensors.torch.load_file(folder / path.name) for folder in (whole, stopped))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    code, errors = aar("tokenize", recordings, stopped, *arguments, "--condition", "none")
    assert code == 2
    assert "another condition" in errors[0]


def test_recordings_are_read_ahead_and_kept_in_order(tmp_path, model, monkeypatch):
    """Later recordings are ready before earlier ones; no more than two for each worker wait."""
    recordings = write_recordings(tmp_path / "wav", count=9, seconds=0.2)
    (recordings / "4.wav").write_bytes(b"broken")
    sat = SAT.from_pretrained(model)
    options = {"condition": "acoustic", "clap": "", "per_shard": 4}
    tokens.tokenize(recordings, tmp_path / "expected", sat, World(), **options, workers=1)

    read, tokenized = tokens.read_recording, tokens._tokenize
    started, done, fourth_is_read = [], [], threading.Event()

    def slow(recording, rate):
        started.append(recording)
        assert len(started) - sum(done) < 2 * 3
        if len(started) == 4:
            fourth_is_read.set()
        time.sleep(0.02 * (recording.path.stem in "036"))
        return read(recording, rate)

    def watched(*arguments):
        assert fourth_is_read.wait(60)
        return tokenized(*arguments)

    monkeypatch.setattr(tokens, "read_recording", slow)
    monkeypatch.setattr(tokens, "_tokenize", watched)
    tokens.tokenize(recordings, tmp_path / "ahead", sat, World(), **options, workers=3, progress=done.append)
    ours, theirs = TokenSet(tmp_path / "ahead"), TokenSet(tmp_path / "expected")
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.conditions, theirs.conditions)
    assert len(started) == sum(done) == 9


def test_ranks_share_the_shards(tmp_path, recordings, model):
    sat, out = SAT.from_pretrained(model), tmp_path / "out"
    for rank in range(2):
        world = World(rank=rank, size=2)
        tokens.tokenize(recordings, out, sat, world, condition="none", clap="", per_shard=2)
        assert len(list(out.glob("shard*"))) == (2, 3)[rank]
    assert len(TokenSet(out)) == 20


def test_broken_recordings_are_left_out(aar, tmp_path, recordings, model):
    (recordings / "1.wav").write_text("no audio")
    assert aar("tokenize", recordings, tmp_path / "out", "--model", model)[0] == 0
    assert len(TokenSet(tmp_path / "out")) == 16


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train-sat", "sat.yaml"], "data.source is missing"),
        (["train-sat", "sat.yaml", "data.source=nowhere"], "nowhere: no such file"),
        (["train-sat", "sat.yaml", "data.sorce=wav"], "the nearest is data.source"),
        (["train-sat", "none.yaml"], "none.yaml: No such file"),
        (["train-aar", "aar.yaml", "tokens=nowhere"], "`aar tokenize DATA nowhere --model SAT`"),
        (["train-aar", "aar.yaml", "tokens=tokens", "condition=clap"], "holds acoustic, not clap"),
        (["train-aar", "aar.yaml", "tokens=tokens", "model.heads=3"], "model: 3 heads"),
    ],
)
def test_mistakes_are_one_line(aar, tmp_path, monkeypatch, recordings, model, arguments, part):
    monkeypatch.chdir(tmp_path)
    write_yaml(Path("sat.yaml"), **SAT_YAML)
    write_yaml(Path("aar.yaml"), **AAR_YAML, tokens="x")
    if "tokens=tokens" in arguments:
        tokens.tokenize(recordings, Path("tokens"), SAT.from_pretrained(model), World(), condition="acoustic", clap="")
    code, errors = aar(*arguments, "--out", "run")
    assert (code, len(errors)) == (2, 1), errors
    assert part in errors[0]
    assert not Path("run").exists()
