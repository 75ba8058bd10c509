"""Two processes learn what one learns from the joint batch, each with the whole model or with a part of it."""

from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import aar_config, chords, on_chords, same_weights, sat_config, tiny_sat

from aar import AAR
from aar.errors import AarError
from aar.training.aar import AARTask
from aar.training.checkpointing import Checkpoints
from aar.training.config import CheckpointConfig, DataConfig, DiscriminatorConfig, ScheduleConfig, TransformerConfig
from aar.training.loop import NotFiniteError, Trainer
from aar.training.losses import LossWeights
from aar.training.sat import SATTask
from aar.training.world import World, joined

STEPS, HALF = 4, 2
KINDS = ("sat", "ddp", "fsdp")  # the last two are of the transformer


def joint_batches(start: int) -> Iterator[dict]:
    """What two processes see in a step of two batches each. In the order of the ranks, since k-means begins with rows
    by their number."""
    for number in count(start):
        first, second = chords(2 * number, 4), chords(2 * number + 1, 4)
        yield {"wav": torch.cat([first[:2], second[:2], first[2:], second[2:]])}


def trainer_of(kind: str, out: Path, tokenizer: Path, world: World, **changes) -> Trainer:
    alone = world.size == 1
    changes = {
        "data": DataConfig(source="unused", batch_size=8 if alone else 2, accumulate=1 if alone else 2),
        "schedule": ScheduleConfig(steps=STEPS, warmup=0), "checkpoint": CheckpointConfig(every=HALF),
    } | changes  # fmt: skip
    batches = joint_batches if alone else None
    if kind == "sat":
        # Feature matching is no mean over items.
        discriminator, losses = DiscriminatorConfig(filters=2, rest=2), LossWeights(feature_matching=0.0)
        config = sat_config(discriminator=discriminator, losses=losses, **changes)
        return Trainer(on_chords(SATTask(config, world), batches), config, out, world)
    config = aar_config(tokens=None, tokenizer=str(tokenizer), parallel=kind, **changes)
    return Trainer(on_chords(AARTask(config, world), batches), config, out, world)


def train(kind: str, out: Path, tokenizer: Path, world: World, resume: bool = False, **changes) -> Trainer:
    trainer = trainer_of(kind, out, tokenizer, world, **changes)
    assert trainer.resume() == resume
    trainer.run()
    return trainer


def half_way(run: Path, out: Path) -> None:
    """In `out` what `run` had written by then."""
    name = f"checkpoints/step-{HALF:09d}.pt"
    (out / name).parent.mkdir(parents=True)
    shutil.copy(run / name, out / name)


def state_of(run: Path) -> dict:
    return Checkpoints(run / "checkpoints", 1).load()


def assert_alike(ours, theirs, where: str = "state") -> None:
    """The same dicts and lists of the same types; tensors nearly equal."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=where)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_alike(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(*pair, f"{where}[{i}]")


def worker(rank: int, path: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}  # fmt: skip
    with joined("cpu") as world:
        assert (world.rank, world.size) == (rank, 2)
        train_each_kind(path, world)
        train_on_otherwise(path, world)
        resume_exactly(path, world)
        if rank == 0:
            half_way(path / "together-ddp", path / "only-0")
        with pytest.raises(AarError, match="different checkpoints"):
            trainer_of("ddp", path / f"only-{rank}", path / "tokenizer", world).resume()
        torch.save(sharded_step(path / "step", path / "tokenizer", world), path / f"step-{rank}.pt")


def train_each_kind(path: Path, world: World) -> None:
    for kind in KINDS:
        model = train(kind, path / f"together-{kind}", path / "tokenizer", world).task.model
        if kind != "fsdp":
            first, second = world.gather(model.state_dict())
            assert all(torch.equal(value, second[name]) for name, value in first.items())


def train_on_otherwise(path: Path, world: World) -> None:
    """From half way where another number of processes, or the other kind, went."""
    runs = (("alone", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp"))
    if world.rank == 0:
        for before, after in runs:
            run = "alone-fsdp" if before == "alone" else f"together-{before}"
            half_way(path / run, path / f"{before}-then-{after}")
    world.gather(None)  # until it is done
    for before, after in runs:
        train(after, path / f"{before}-then-{after}", path / "tokenizer", world, resume=True)


def resume_exactly(path: Path, world: World) -> None:
    """Each rank has its own random numbers, and gets them back."""
    model = TransformerConfig(depth=1, width=16, heads=2, condition_drop=0.5)
    for kind in ("ddp", "fsdp"):
        run, again = path / f"{kind}-left-alone", path / f"{kind}-resumed"
        train(kind, run, path / "tokenizer", world, model=model)
        if world.rank == 0:
            half_way(run, again)
        world.gather(None)
        train(kind, again, path / "tokenizer", world, resume=True, model=model)
        assert not torch.equal(*world.gather(torch.get_rng_state()))


class Sent(TorchDispatchMode):
    """Counts the collective calls inside, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call.namespace == "c10d":
            self.calls[str(call)] += 1
        return call(*args, **(kwargs or {}))


def sharded_step(out: Path, tokenizer: Path, world: World) -> dict:
    """One step, and what it sent and left; sounds; a step in which one process meets a NaN; steps in bfloat16."""
    trainer = trainer_of("fsdp", out, tokenizer, world)
    model = trainer.task.model.train()
    parts = [{"wav": chords(2 * i + world.rank, 2)} for i in range(2)]
    with Sent() as sent:
        numbers = trainer._train(parts)
    outside = [p for name, p in model.named_parameters() if not name.startswith("quantizer.")]
    found = {
        "sent": dict(sent.calls),
        "sharded": all(isinstance(p, DTensor) for p in outside),
        "kept": sum(p.to_local().numel() for p in outside), "of": sum(p.numel() for p in outside),
        "norm": numbers["transformer/gradient norm"], "sounds": trainer._sounds(parts[0]),
    }  # fmt: skip
    batch = trainer.task.prepare(parts[0])
    if world.rank == 1:
        batch["condition"][0, 0] = torch.nan
    with pytest.raises(NotFiniteError) as error:
        trainer._train([batch])
    found["error"] = str(error.value)
    for kind in ("ddp", "fsdp"):
        trainer = trainer_of(kind, out, tokenizer, world, precision="bfloat16")
        trainer.task.model.train()
        found[kind] = [trainer._train(parts)["transformer/loss"] for _ in range(6)]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all that one process and two have trained."""
    path = tmp_path_factory.mktemp("runs")
    tiny_sat().save_pretrained(path / "tokenizer")
    for kind in KINDS:
        train(kind, path / f"alone-{kind}", path / "tokenizer", World())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (path, port), nprocs=2)
    return path


def assert_same_training(run: Path, expected: Path) -> None:
    ours, theirs = state_of(run), state_of(expected)
    assert ours["step"] == theirs["step"] == STEPS
    # Of a discriminator some gradients are mere rounding, which Adam makes steps of full size.
    assert ours["players"].keys() == theirs["players"].keys()
    for state in (ours, theirs):
        if state["players"].pop("discriminator", None):
            del state["optimizers"]
    for what in ours.keys() & {"players", "optimizers", "average"}:
        assert_alike(ours[what], theirs[what], what)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(runs, kind):
    assert_same_training(runs / f"together-{kind}", runs / f"alone-{kind}")


@pytest.mark.parametrize("run", ["alone-then-fsdp", "fsdp-then-ddp", "ddp-then-fsdp"])
def test_two_processes_resume_what_others_began(runs, run):
    assert_same_training(runs / run, runs / "alone-fsdp")


def test_one_process_resumes_what_two_began(runs):
    half_way(runs / "together-fsdp", runs / "fsdp-then-alone")
    train("fsdp", runs / "fsdp-then-alone", runs / "tokenizer", World(), resume=True)
    assert_same_training(runs / "fsdp-then-alone", runs / "alone-fsdp")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resumed_is_left_alone(runs, kind):
    ours, theirs = (AAR.from_pretrained(runs / f"{kind}-{name}/model") for name in ("left-alone", "resumed"))
    assert same_weights(ours, theirs)


def test_finished_model_of_parts_is_whole(runs):
    finished = AAR.from_pretrained(runs / "together-fsdp/model").state_dict()
    expected = state_of(runs / "together-fsdp")["average"]
    assert all(torch.equal(value, expected[name]) for name, value in finished.items())


@pytest.fixture(scope="module")
def steps(runs) -> list[dict]:
    """What each process says of a step of parts."""
    return [torch.load(runs / f"step-{rank}.pt", weights_only=True) for rank in range(2)]


def test_each_process_keeps_half(steps):
    for step in steps:
        assert step["sharded"]
        assert 0.4 < step["kept"] / step["of"] < 0.6
    assert sum(step["kept"] for step in steps) == steps[0]["of"]


def test_what_travels(steps):
    """Each of two blocks once forward and once backward, what is outside of blocks once, for each of two batches.
    Gradients travel with the last batch alone."""
    for step in steps:
        sent = step["sent"]
        assert sum(count for name, count in sent.items() if "allgather" in name) == 2 * (2 + 2 + 1), sent
        assert sum(count for name, count in sent.items() if "reduce_scatter" in name) == 2 + 1, sent


def test_norm_of_gradients_is_that_of_all(steps, runs):
    assert steps[0]["norm"] == steps[1]["norm"]
    alone = trainer_of("ddp", runs / "norm", runs / "tokenizer", World())
    alone.task.model.train()
    parts = [chords(2 * i + rank, 2) for i in range(2) for rank in range(2)]
    expected = alone._train([{"wav": torch.cat(parts)}])["transformer/gradient norm"]
    assert steps[0]["norm"] == pytest.approx(expected, rel=1e-4)


def test_sounds_of_a_model_in_parts(steps):
    assert set(steps[0]["sounds"]) == {"tokenized", "unconditional", "conditional"}
    assert all(wave.isfinite().all() for wave in steps[0]["sounds"].values())
    assert steps[1]["sounds"] == {}


def test_nan_in_one_process_stops_both(steps, runs):
    assert all("transformer/loss" in step["error"] for step in steps)
    saved = torch.load(runs / "step/not-finite-000000002.rank0.pt", weights_only=True)
    assert saved["step"] == 1
    weights = saved["players"]["transformer"]
    assert weights["blocks.0.fc1.weight"].shape == (128, 32)
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_parts_in_bfloat16(steps):
    """Weights are rounded before they travel, not after."""
    for step in steps:
        assert step["fsdp"] == pytest.approx(step["ddp"], rel=5e-3)
        assert step["fsdp"][-1] < step["fsdp"][0]
