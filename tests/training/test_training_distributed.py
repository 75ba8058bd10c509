"""Two processes learn what one learns from the joint batch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
import torch.multiprocessing as mp
from training_cases import aar_config, chords, on_chords, sat_config, tiny_sat

from aar.training.aar import AARTask
from aar.training.config import CheckpointConfig, DataConfig, DiscriminatorConfig, ScheduleConfig, TransformerConfig
from aar.training.loop import Trainer
from aar.training.losses import LossWeights
from aar.training.sat import SATTask
from aar.training.world import World, joined

STEPS = ScheduleConfig(steps=4, warmup=0)


def joint_batches(start: int) -> Iterator[dict]:
    """What two processes see in a step of two batches each. In the order of the ranks, since k-means begins with rows
    by their number."""
    for number in count(start):
        first, second = chords(2 * number, 4), chords(2 * number + 1, 4)
        yield {"wav": torch.cat([first[:2], second[:2], first[2:], second[2:]])}


def trainer_of(kind: str, out: Path, tokenizer: str, world: World, **changes) -> Trainer:
    alone = world.size == 1
    data = DataConfig(source="unused", batch_size=8 if alone else 2, accumulate=1 if alone else 2)
    batches = joint_batches if alone else None
    if kind == "sat":
        # Feature matching is no mean over items.
        discriminator, losses = DiscriminatorConfig(filters=2, rest=2), LossWeights(feature_matching=0.0)
        config = sat_config(data=data, schedule=STEPS, discriminator=discriminator, losses=losses, **changes)
        return Trainer(on_chords(SATTask(config, world), batches), config, out / kind, world)
    config = aar_config(data=data, schedule=STEPS, tokens=None, tokenizer=tokenizer, **changes)
    return Trainer(on_chords(AARTask(config, world), batches), config, out / kind, world)


def train(out: Path, tokenizer: str, world: World) -> None:
    for kind in ("sat", "aar"):
        trainer = trainer_of(kind, out, tokenizer, world)
        trainer.run()
        torch.save(trainer.task.model.state_dict(), out / f"{kind}-{world.rank}.pt")


def worker(rank: int, out: Path, tokenizer: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}  # fmt: skip
    with joined("cpu") as world:
        assert (world.rank, world.size) == (rank, 2)
        train(out, tokenizer, world)
        resumed_is_left_alone(out / "resumed", tokenizer, world)


def resumed_is_left_alone(out: Path, tokenizer: str, world: World) -> None:
    """Each rank has its own random numbers, and gets them back."""
    changes = {"model": TransformerConfig(depth=1, width=16, heads=2, condition_drop=0.5)}

    def run(out: Path, resume: bool, **more) -> Trainer:
        trainer = trainer_of("aar", out, tokenizer, world, **changes, **more)
        assert trainer.resume() == resume
        trainer.run()
        return trainer

    alone = run(out, False, checkpoint=CheckpointConfig(every=2))
    if world.rank == 0:
        (out / "aar/checkpoints/step-000000004.pt").unlink()
    world.gather(None)  # until it is done
    again = run(out, True)
    for name, value in alone.task.model.state_dict().items():
        assert torch.equal(value, again.task.model.state_dict()[name]), name
    states = world.gather(torch.get_rng_state())
    assert not torch.equal(*states)


def test_two_processes_are_one(tmp_path):
    tokenizer = str(tmp_path / "tokenizer")
    tiny_sat().save_pretrained(tokenizer)
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    train(tmp_path / "alone", tokenizer, World())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (tmp_path / "together", tokenizer, port), nprocs=2)
    for kind in ("sat", "aar"):
        first, second = (torch.load(tmp_path / "together" / f"{kind}-{rank}.pt") for rank in range(2))
        alone = torch.load(tmp_path / "alone" / f"{kind}-0.pt")
        for name, value in alone.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4, msg=f"{kind} {name}")
