"""Training steps to be timed: forward and backward, in several variants that compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aar_kernels as ak
from aar import AAR, SAT, SATConfig
from aar.baselines import PlainAAR
from aar.training.config import SATTraining
from aar.training.sat import SATTask
from aar.training.world import World

from .roofline import autoencoder_training_flops, tokenizer_training_flops, training_flops

PLAIN = "plain PyTorch"

Forward = Callable[[Tensor, Tensor], Tensor]  # condition, inputs -> logits


class Steps(Protocol):
    """
    Attributes:
        name: of what is trained.
        models: where each variant leaves its gradients; "ours" first, `PLAIN` among them.
    """

    name: str
    models: dict[str, nn.Module]

    def double(self) -> Steps:
        """The same weights in float64, with the variant `PLAIN`."""

    def step(self, variant: str, batch: int, autocast: bool) -> Callable[[], Tensor]:
        """A run that returns the model's loss and leaves its gradients; the same numbers come in for each variant."""

    def flops(self, batch: int) -> int:
        """The least that a step must do."""


class AARSteps:
    """Teacher-forced steps of an AAR."""

    def __init__(self, model: AAR, *, compiled: bool = False):
        config = model.config
        self.name, self.model = f"AAR, depth {config.depth}, width {config.width}", model
        plain = PlainAAR(model).forward
        self.forwards: dict[str, Forward] = {"ours": model, PLAIN: plain}
        if compiled:
            self.forwards["torch.compile"] = torch.compile(plain, dynamic=False)
        self.models = dict.fromkeys(self.forwards, model)

    def double(self) -> AARSteps:
        return AARSteps(copy.deepcopy(self.model).double())

    def step(self, variant: str, batch: int, autocast: bool) -> Callable[[], Tensor]:
        model, generator = self.model, torch.Generator().manual_seed(batch)
        codes = torch.randint(model.config.codebook_size, (batch, model.schedule.total), generator=generator)
        condition = torch.randn(batch, model.config.condition_dim, generator=generator).to(model.position.dtype)
        inputs = model.quantizer.next_scale_inputs(codes, backend="reference")

        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = self.forwards[variant](condition, inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
            loss.backward()
            return loss.detach()

        return run

    def flops(self, batch: int) -> int:
        return training_flops(self.model, batch)


class SATSteps:
    """Steps of a SAT as `aar train-sat` takes them: all losses, the discriminator's too, and the codebooks' update.

    PLAIN is the same model with all operators on the reference backend. Each variant has a copy of the model, since
    codebooks move at each step.
    """

    def __init__(self, config: SATTraining):
        task = SATTask(config, World())
        task.start([{"wav": _sound(config.model, 8)}])
        for player in task.players.values():
            player.train()
        self._take({"ours": task, PLAIN: copy.deepcopy(task)})

    def _take(self, tasks: dict[str, SATTask]) -> None:
        self.tasks = tasks
        self.models = {name: task.model for name, task in tasks.items()}
        self.config = next(iter(tasks.values())).config
        parameters = sum(p.numel() for p in next(iter(self.models.values())).parameters())
        self.name = f"SAT, {parameters / 1e6:.1f} M parameters"

    def double(self) -> SATSteps:
        task = copy.deepcopy(self.tasks[PLAIN])
        for module in (*task.players.values(), task.criterion):
            module.double()
        steps = copy.copy(self)
        steps._take({PLAIN: task})
        return steps

    def step(self, variant: str, batch: int, autocast: bool) -> Callable[[], Tensor]:
        task = self.tasks[variant]
        wav = _sound(self.config.model, batch).to(task.model.quantizer.codebooks.dtype)

        def run() -> Tensor:
            for player in task.players.values():
                player.zero_grad(set_to_none=True)
            found = []
            with ak.use_backend("reference" if variant == PLAIN else None), task.updating():
                losses = task.losses({"wav": wav}, step=1)
                while True:
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = next(losses, None)
                    if loss is None:
                        return found[0]
                    loss.total.backward()
                    found.append(loss.total.detach())

        return run

    def flops(self, batch: int) -> int:
        return tokenizer_training_flops(self.tasks[PLAIN].model, batch)


class AutoencoderSteps:
    """A SAT's encoder and decoder alone: without quantizer, and with the mean square for a loss."""

    def __init__(self, model: SAT, *, compiled: bool = False):
        self.model = model
        parameters = sum(p.numel() for half in (model.encoder, model.decoder) for p in half.parameters())
        self.name = f"SAT's autoencoder, {parameters / 1e6:.1f} M parameters"
        plain = (model.encoder.model, model.decoder.model)
        self.halves = {"ours": (model.encoder, model.decoder), PLAIN: plain}
        if compiled:
            self.halves["torch.compile"] = tuple(torch.compile(half, dynamic=False) for half in plain)
        self.models = dict.fromkeys(self.halves, model)

    def double(self) -> AutoencoderSteps:
        return AutoencoderSteps(copy.deepcopy(self.model).double())

    def step(self, variant: str, batch: int, autocast: bool) -> Callable[[], Tensor]:
        encoder, decoder = self.halves[variant]
        wav = _sound(self.model.config, batch).to(next(self.model.parameters()).dtype)

        def run() -> Tensor:
            self.model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = decoder(encoder(wav)).square().mean()
            loss.backward()
            return loss.detach()

        return run

    def flops(self, batch: int) -> int:
        return autoencoder_training_flops(self.model, batch)


def _sound(config: SATConfig, items: int) -> Tensor:
    """Noise that swells and fades: [items, 1, window_samples]."""
    generator, samples = torch.Generator().manual_seed(items), config.window_samples
    swell = torch.rand(items, 1, 16, generator=generator)
    noise = torch.randn(items, 1, samples, generator=generator)
    return 0.2 * noise * F.interpolate(swell, samples, mode="linear", align_corners=True)
