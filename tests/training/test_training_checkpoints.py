"""Checkpoints: whole or not there, the newest few, and of a killed training enough to end as if it had not been."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from training_cases import (
    SAT_YAML,
    aar_config,
    chord_batches,
    on_chords,
    sat_config,
    tiny_sat,
    train_sat,
    write_recordings,
    write_yaml,
)

from aar import cli
from aar.errors import AarError
from aar.training import checkpointing
from aar.training.aar import AARTask
from aar.training.checkpointing import Checkpoints, CheckpointWriteError
from aar.training.config import CheckpointConfig, DataConfig, DiscriminatorConfig, ScheduleConfig
from aar.training.loop import NotFiniteError, Trainer
from aar.training.sat import SATTask
from aar.training.world import World


def assert_equal(ours, theirs, where: str = "state") -> None:
    """Bit for bit, through dicts and lists."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_equal(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def test_killed_and_resumed_ends_as_one_left_alone(tmp_path):
    source = write_recordings(tmp_path / "wav")
    config = write_yaml(tmp_path / "sat.yaml", **SAT_YAML | {"schedule": {"steps": 16, "warmup": 2}})
    arguments = ["train-sat", str(config), f"data.source={source}", "--device", "cpu", "--out"]
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "aar", *arguments, str(killed)], env=environment)
    try:
        end = time.monotonic() + 120
        while not (killed / "checkpoints" / "step-000000004.pt").exists():
            assert process.poll() is None, "the training ended by itself"
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "model").exists()
    assert cli.main([*arguments, str(killed), "--resume"]) == 0
    assert cli.main([*arguments, str(alone)]) == 0
    states = [Checkpoints(path / "checkpoints", 2).load() for path in (killed, alone)]
    assert states[0]["step"] == 16
    assert_equal(*states)
    assert (killed / "model/model.safetensors").read_bytes() == (alone / "model/model.safetensors").read_bytes()
    steps = [line.split(",")[0] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in range(1, 17)]


def test_a_bounded_number_is_kept(tmp_path):
    config = sat_config(checkpoint=CheckpointConfig(every=2, keep=2), schedule=ScheduleConfig(steps=7, warmup=0))
    train_sat(config, tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000000006.pt", "step-000000007.pt"]


def test_damaged_checkpoints_are_passed_over(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step, "weights": torch.full((10_000,), float(step))})
    newest, second, _ = checkpoints.paths()
    newest.write_bytes(newest.read_bytes()[:-1000])
    content = bytearray(second.read_bytes())
    content[20_000] ^= 1
    second.write_bytes(content)
    assert checkpoints.load()["step"] == 1
    assert [newest.name in caplog.text, second.name in caplog.text] == [True, True]


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    leftover = tmp_path / "checkpoints" / ".step-000000004.abcd.pt"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    train_sat(sat_config(schedule=ScheduleConfig(steps=1)), tmp_path)
    assert not leftover.exists()


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A folder on a disk of 200 kB; where it cannot be mounted, one on which torch.save finds no room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        plain = torch.save

        def save(state, file):
            if sum(path.stat().st_size for path in folder.iterdir()) > 100_000:
                file.write(b"half of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            plain(state, file)

        monkeypatch.setattr(checkpointing.torch, "save", save)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_the_last_checkpoint_whole(full_disk):
    checkpoints = Checkpoints(full_disk, keep=3)
    state = {"step": 1, "weights": torch.randn(30_000)}
    checkpoints.save(1, state)
    with pytest.raises(CheckpointWriteError) as error:
        checkpoints.save(2, state | {"step": 2})
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in ("step-000000002.pt", "No space left", "step-000000001.pt is whole"))
    assert os.listdir(full_disk) == ["step-000000001.pt"]
    assert_equal(checkpoints.load(), state)


def test_nan_stops_and_nothing_is_lost(tmp_path):
    def batches(start):
        for number, batch in enumerate(chord_batches(start), start=start):
            if number == 5:
                batch["wav"][2, 0, 100] = float("nan")
            yield batch

    config = sat_config(checkpoint=CheckpointConfig(every=4), schedule=ScheduleConfig(steps=10))
    with pytest.raises(NotFiniteError) as error:
        train_sat(config, tmp_path, batches)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in ("step 6", "NaN", "tokenizer/loss", "step-000000004.pt"))
    saved = torch.load(next(tmp_path.glob("not-finite-*.pt")), weights_only=True)
    assert saved["step"] == 5
    assert saved["batches"][0]["wav"].isnan().any()
    players = saved["players"]["tokenizer"]
    assert all(value.isfinite().all() for value in players.values() if value.is_floating_point())

    # The saved state is that before the step: with a sound batch in its place, training goes on as if nothing had been.
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    checkpoints.save(5, saved)
    resumed = Trainer(on_chords(SATTask(config, World())), config, tmp_path, World())
    assert resumed.resume()
    resumed.run()
    alone = train_sat(config, tmp_path / "alone")
    assert_equal(resumed.task.model.state_dict(), alone.task.model.state_dict())


def test_checkpoints_of_another_model_are_refused(tmp_path):
    config = sat_config(schedule=ScheduleConfig(steps=1))
    train_sat(config, tmp_path)
    other = sat_config(discriminator=DiscriminatorConfig(filters=2))
    with pytest.raises(AarError, match="another discriminator"):
        Trainer(SATTask(other, World()), other, tmp_path, World()).resume()


def test_checkpoints_of_another_tokenizer_are_refused(tmp_path):
    """Its codes mean something else."""
    sat = tiny_sat()
    for name in ("first", "second"):
        sat.save_pretrained(tmp_path / name)
        sat.quantizer.codebooks.mul_(2)
    first, second = (aar_config(tokens=None, tokenizer=str(tmp_path / name), data=DataConfig(source="unused"))
                     for name in ("first", "second"))  # fmt: skip
    out = tmp_path / "run"
    Trainer(AARTask(first, World()), first, out, World()).save()
    assert Trainer(AARTask(first, World()), first, out, World()).resume()
    for other, what in ((second, "tokenizer"), (replace(first, condition="none"), "condition")):
        with pytest.raises(AarError, match=f"another {what}"):
            Trainer(AARTask(other, World()), other, out, World()).resume()


def test_settings_of_the_optimizer_are_those_of_now(tmp_path):
    config = sat_config(schedule=ScheduleConfig(steps=1))
    before = train_sat(config, tmp_path)
    changed = replace(config, optimizer=replace(config.optimizer, weight_decay=0.1, betas=(0.8, 0.9)))
    trainer = Trainer(SATTask(changed, World()), changed, tmp_path, World())
    assert trainer.resume()
    ours, theirs = (each.optimizers["tokenizer"].state_dict() for each in (trainer, before))
    assert_equal(ours["state"], theirs["state"])
    assert [group["weight_decay"] for group in ours["param_groups"]] == [0.1, 0.0]
    assert ours["param_groups"][0]["betas"] == (0.8, 0.9)
