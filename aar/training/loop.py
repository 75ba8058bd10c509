"""The training loop of both models."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..atomic import replacing
from ..errors import AarError
from ..models.pretrained import Pretrained
from .checkpointing import Checkpoints, write_state
from .config import TrainingConfig
from .logbook import Logbook
from .optimization import WeightAverage, learning_rate_factor, optimizer_of
from .sharding import load_model, load_optimizer, whole
from .world import World, without_reduction

__all__ = ["Batch", "Loss", "NotFiniteError", "Task", "Trainer"]

Batch = dict[str, Any]
"""Tensors on the training's device, each with an item per row, and whatever else the data says."""


class NotFiniteError(AarError):
    """A loss or a gradient was NaN or infinite. The state before the step has been saved."""


class Loss(NamedTuple):
    """What the player of this name learns from, and its terms, for the log; scalars, means over items."""

    player: str
    total: Tensor
    terms: dict[str, Tensor]


class Task(Protocol):
    """What is trained, and on what.

    Attributes:
        model: what the training is for.
        players: modules by name, each with an optimizer of its own; the model is among them.
        parallel: those modules through which gradients of several processes meet.
        sample_rate: of waves, in Hz.
        seconds_per_item: of sound.
    """

    model: Pretrained
    players: dict[str, nn.Module]
    parallel: list[nn.Module]
    sample_rate: int
    seconds_per_item: float

    def accepts(self, players: dict[str, dict[str, Tensor]]) -> bool:
        """Whether these states of the players were trained on such data as this task's."""

    def prepare(self, batch: Batch) -> Batch:
        """What `losses` needs, made of a batch of the data; without gradients."""

    def start(self, batches: list[Batch]) -> None:
        """Called once, with the batches of the very first step, before it."""

    def updating(self) -> AbstractContextManager:
        """Around the batches of a step; what a model counts by itself takes effect at the end, unless it raises."""

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One after the other, so that a graph is gone before the next one is made."""

    def batches(self, world: World, start: int) -> Iterable[Batch]:
        """Endless batches of this process, from number `start` on."""

    def held_out(self, world: World) -> Sequence[Batch]:
        """Batches that are not learned from; none without such data."""

    def numbers(self) -> dict[str, float]:
        """For the log; every process asks."""

    def sounds(self, batch: Batch, model: Pretrained) -> dict[str, Tensor]:
        """Waves [N] to listen to, of `model`, which is that of the task or a copy."""


class Trainer:
    """Trains a task.

    In `out`: checkpoints/, metrics.jsonl, tensorboard/, config.yaml, and at the end model/, to be loaded with
    `from_pretrained`.

    A step is that of one batch which holds the items of all its batches and processes: losses are weighted by items,
    codebooks updated once. (Not so a loss that is no mean over items: feature matching divides by a mean of its own.)
    """

    def __init__(self, task: Task, config: TrainingConfig, out: Path, world: World):
        self.task, self.config, self.out, self.world = task, config, out, world
        self.optimizers = {name: optimizer_of(player, config.optimizer) for name, player in task.players.items()}
        self.average = WeightAverage(task.model, config.ema) if config.ema else None
        self.checkpoints = Checkpoints(out / "checkpoints", config.checkpoint.keep)
        self.step = self.position = 0
        # From here on ranks draw apart: which items lose their condition, which rows replace dead codes.
        torch.manual_seed(config.seed + world.rank)

    def resume(self) -> bool:
        """Goes back to the newest whole checkpoint, by however many processes; whether there is one.

        Raises:
            AarError: it is that of another model, or not every process sees it.
        """
        state = self.checkpoints.load()
        if len(set(self.world.gather(state and state["step"]))) > 1:
            raise AarError(f"{self.out}: processes see different checkpoints in it; all must share its disk")
        if state is None:
            return False
        before, now = state["config"], _plain(asdict(self.config))
        different = [what for what in ("model", "discriminator", "condition") if before.get(what) != now.get(what)]
        if different or not self.task.accepts(state["players"]):
            what = different[0] if different else "tokenizer"
            raise AarError(f"{self.out}: its checkpoints are of another {what}; name another --out")
        for name, player in self.task.players.items():
            load_model(player, state["players"][name])
            load_optimizer(self.optimizers[name], state["optimizers"][name])
        if self.average:
            self.average = WeightAverage(self.task.model, self.config.ema)
            if state["average"]:
                self.average.load(state["average"])
        self.step, processes = state["step"], len(state["random"])
        # Batches of this process that hold what all have seen.
        seen = state["position"] * processes * before["data"]["batch_size"]
        self.position = seen // (self.world.size * self.config.data.batch_size)
        if processes == self.world.size:
            _set_random_state(state["random"][self.world.rank], self.world.device)
        else:  # as many processes as before would go on where they were; these begin anew
            torch.manual_seed(self.config.seed + self.step * self.world.size + self.world.rank)
        return True

    def run(self) -> None:
        """Trains up to the last step.

        Raises:
            NotFiniteError: NaN in a loss; nothing is lost but the steps since the last checkpoint.
            CheckpointWriteError: no room.
        """
        config, first = self.config, self._first
        # First, since anything may be wrong with the data, and nothing is written then.
        batches = iter(self.task.batches(self.world, self.position))
        held_out = self.task.held_out(self.world)
        if first:
            self.checkpoints.clean()
        for player in self.task.players.values():
            player.train()
        with contextlib.ExitStack() as stack:
            log = None
            if first:
                log = stack.enter_context(Logbook(self.out, config, self.step, self.task.sample_rate))
                with replacing(self.out / "config.yaml") as path:
                    path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
            began, seen = time.perf_counter(), 0
            while self.step < config.schedule.steps:
                parts = [self._to_device(next(batches)) for _ in range(config.data.accumulate)]
                numbers = self._train(parts)
                seen += sum(map(_items, parts)) * self.world.size
                seconds = time.perf_counter() - began
                numbers["seconds per second"] = seen * self.task.seconds_per_item / seconds
                if self._due(config.logging.every):
                    began, seen = time.perf_counter(), 0
                    numbers |= self.task.numbers() | {"learning rate": self._learning_rate(self.step - 1)}
                if held_out and self._due(config.logging.held_out_every):
                    numbers |= self._try(held_out)
                sounds = self._sounds(parts[0]) if self._due(config.logging.sounds_every) else {}
                if log:
                    log.show(numbers)
                    if "learning rate" in numbers or "held out/loss" in numbers:
                        log.numbers(self.step, numbers)
                    log.sounds(self.step, sounds)
                if self._due(config.checkpoint.every) or self.step == config.schedule.steps:
                    self.save()
            finished = self.finished_model()
            if finished:
                finished.save_pretrained(self.out / "model")

    def finished_model(self) -> Pretrained | None:
        """A copy of the model with averaged weights, on the CPU, for the first process; every process must call."""
        state = whole(self.task.model.state_dict() | (self.average.weights if self.average else {}), self._first)
        return self._copy_of_model(state).eval() if self._first else None

    def save(self) -> None:
        """Writes a checkpoint; every process must call."""
        state = self._state(self.world.gather(_random_state(self.world.device)))
        if self._first:
            self.checkpoints.save(self.step, state)

    def _train(self, parts: list[Batch]) -> dict[str, float]:
        """One step; the means of what it gave over all processes."""
        task, config, device = self.task, self.config, self.world.device
        before = _random_state(device)
        prepared = [task.prepare(part) for part in parts]
        total_items = sum(map(_items, parts))
        if self.step == 0:
            with self._autocast():
                task.start(prepared)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(self.step)

        sums: dict[str, Tensor] = {}
        players = []
        with task.updating():
            for i, part in enumerate(prepared):
                weight = _items(parts[i]) / total_items
                with without_reduction(task.parallel if i < len(prepared) - 1 else []):
                    losses = task.losses(part, self.step)
                    while True:
                        with self._autocast():
                            loss = next(losses, None)
                        if loss is None:
                            break
                        (weight * loss.total).backward()
                        terms = {f"{loss.player}/{name}": term for name, term in loss.terms.items()}
                        for name, term in ({f"{loss.player}/loss": loss.total} | terms).items():
                            sums[name] = sums.get(name, 0.0) + weight * term.detach().float()
                        if i == 0:
                            players.append(loss.player)
            clip = config.optimizer.clip or math.inf
            for name in players:
                norm = nn.utils.clip_grad_norm_(task.players[name].parameters(), clip)
                sums[f"{name}/gradient norm"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
            # The one transfer from the device in a step: before the weights change, so that none ever becomes NaN.
            values = self.world.mean(torch.stack(list(sums.values()))).tolist()
            numbers = dict(zip(sums, values, strict=True))
            if not all(map(math.isfinite, values)):
                self._stop(numbers, parts, before)
        for name in players:
            self.optimizers[name].step()
        self.step += 1
        self.position += len(parts)
        if self.average:
            self.average.update(task.model, self.step)
        return numbers

    def _stop(self, numbers: dict[str, float], parts: list[Batch], random: dict) -> None:
        """Saves the state before the step that failed, with its batches, and raises; every process must call."""
        path = self.out / f"not-finite-{self.step + 1:09d}.rank{self.world.rank}.pt"
        bad = ", ".join(name for name, value in numbers.items() if not math.isfinite(value))
        state = self._state(self.world.gather(random)) | {"batches": parts, "numbers": numbers}
        try:
            write_state(path, state)
            saved = f"its batches and the state before it are in {path}"
        except OSError as error:
            saved = f"its state could not be saved ({error.strerror})"
        last = next(iter(self.checkpoints.paths()), None)
        raise NotFiniteError(
            f"step {self.step + 1}: NaN or infinite {bad}; {saved}; "
            f"{f'the last checkpoint is {last.name}' if last else 'there is no checkpoint yet'}"
        )

    def _state(self, random: list[dict]) -> dict[str, Any]:
        """What is sharded is whole in the first process's, and missing in the others'; every process must call."""
        state = {
            "step": self.step,
            "position": self.position,
            "config": _plain(asdict(self.config)),
            "players": {name: player.state_dict() for name, player in self.task.players.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "average": self.task.model.state_dict() | self.average.weights if self.average else None,
            "random": random,
        }
        return whole(state, self._first)

    def _try(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The model's own losses on these batches, means over all processes."""
        sums = {}
        with self._aside():
            for batch in batches:
                with self._autocast():
                    loss = next(self.task.losses(self.task.prepare(self._to_device(batch)), self.step))
                for name, term in ({"loss": loss.total} | loss.terms).items():
                    sums[name] = sums.get(name, 0.0) + term.float()
        values = self.world.mean(torch.stack(list(sums.values())) / len(batches)).tolist()
        return {f"held out/{name}": value for name, value in zip(sums, values, strict=True)}

    def _sounds(self, part: Batch) -> dict[str, Tensor]:
        """Of the first process; every process must call."""
        model = self.task.model
        with self._aside():
            if isinstance(model, FSDPModule):  # sampling calls parts of it by themselves
                state = whole(model.state_dict(), self._first)
                model = self._copy_of_model(state).to(self.world.device).eval() if self._first else None
            return self.task.sounds(part, model) if self._first else {}

    def _copy_of_model(self, state: dict[str, Tensor]) -> Pretrained:
        model = type(self.task.model)(self.task.model.config)  # of a sharded model's class this makes a whole one
        model.load_state_dict(state)
        return model

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """The model as it is used; what is drawn inside leaves no trace in the state of the training."""
        model = self.task.model
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            try:
                yield
            finally:
                model.train()

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _to_device(self, batch: Batch) -> Batch:
        device = self.world.device
        return {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()}  # fmt: skip

    def _learning_rate(self, step: int) -> float:
        return self.config.optimizer.learning_rate * learning_rate_factor(step, self.config.schedule)

    @property
    def _first(self) -> bool:
        return self.world.rank == 0

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


def _items(batch: Batch) -> int:
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def _plain(value: Any) -> Any:
    """What YAML and a checkpoint hold alike: lists for tuples."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
