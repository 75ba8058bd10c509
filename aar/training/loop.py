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

from ..atomic import replacing
from ..errors import AarError
from ..models.pretrained import Pretrained
from .checkpointing import Checkpoints, write_state
from .config import TrainingConfig
from .logbook import Logbook
from .optimization import WeightAverage, learning_rate_factor, optimizer_of
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

    def sounds(self, batch: Batch) -> dict[str, Tensor]:
        """Waves [N] to listen to."""


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
        """Goes back to the newest whole checkpoint; whether there is one.

        Raises:
            AarError: it is that of another model.
        """
        state = self.checkpoints.load()
        if state is None:
            return False
        for what in ("model", "discriminator"):
            if state["config"].get(what) != _plain(asdict(self.config)).get(what):
                raise AarError(f"{self.out}: its checkpoints are of another {what}; name another --out")
        for name, player in self.task.players.items():
            player.load_state_dict(state["players"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        if self.average:
            self.average.module.load_state_dict(state["average"] or self.task.model.state_dict())
        self.step, self.position = state["step"], state["position"]
        if len(state["random"]) == self.world.size:
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
        config, first = self.config, self.world.rank == 0
        # First, since anything may be wrong with the data, and nothing is written then.
        batches = iter(self.task.batches(self.world, self.position))
        held_out = self.task.held_out(self.world)
        if first:
            self.checkpoints.clean()
            with replacing(self.out / "config.yaml") as path:
                path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
        for player in self.task.players.values():
            player.train()
        with contextlib.ExitStack() as stack:
            log = None
            if first:
                log = stack.enter_context(Logbook(self.out, config, self.step, self.task.sample_rate))
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
                if log:
                    log.show(numbers)
                    if "learning rate" in numbers or "held out/loss" in numbers:
                        log.numbers(self.step, numbers)
                    if self._due(config.logging.sounds_every):
                        log.sounds(self.step, self._sounds(parts[0]))
                if self._due(config.checkpoint.every) or self.step == config.schedule.steps:
                    self.save()
            if first:
                self.finished_model().save_pretrained(self.out / "model")

    def finished_model(self) -> Pretrained:
        return self.average.module if self.average else self.task.model

    def save(self) -> None:
        """Writes a checkpoint; every process must call it."""
        state = self._state(self.world.gather(_random_state(self.world.device)))
        if self.world.rank == 0:
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
            norms = {name: nn.utils.clip_grad_norm_(task.players[name].parameters(), clip) for name in players}
            sums |= {f"{name}/gradient norm": norm.float() for name, norm in norms.items()}
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
        """Saves the state before the step that failed, with its batches, and raises."""
        path = self.out / f"not-finite-{self.step + 1:09d}.rank{self.world.rank}.pt"
        bad = ", ".join(name for name, value in numbers.items() if not math.isfinite(value))
        try:
            write_state(path, self._state([random]) | {"batches": parts, "numbers": numbers})
            saved = f"its batches and the state before it are in {path}"
        except OSError as error:
            saved = f"its state could not be saved ({error.strerror})"
        last = next(iter(self.checkpoints.paths()), None)
        raise NotFiniteError(
            f"step {self.step + 1}: NaN or infinite {bad}; {saved}; "
            f"{f'the last checkpoint is {last.name}' if last else 'there is no checkpoint yet'}"
        )

    def _state(self, random: list[dict]) -> dict[str, Any]:
        return {
            "step": self.step,
            "position": self.position,
            "config": _plain(asdict(self.config)),
            "players": {name: player.state_dict() for name, player in self.task.players.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "average": self.average.module.state_dict() if self.average else None,
            "random": random,
        }

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
        with self._aside():
            return self.task.sounds(part)

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
