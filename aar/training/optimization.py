"""Optimizers, learning rates and averages of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import OptimizerConfig, ScheduleConfig
from .sharding import part_of

__all__ = ["WeightAverage", "learning_rate_factor", "optimizer_of"]


def optimizer_of(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Over the parameters that are trained, matrices and vectors apart, since only matrices decay."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.kind]
    return kind([group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas)


def learning_rate_factor(step: int, config: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied by at `step`, from 0. A function of it alone: there is no state."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = min((step - config.warmup) / max(config.steps - config.warmup, 1), 1.0)
    return config.final + (1 - config.final) * (0.5 + 0.5 * math.cos(math.pi * progress))


class WeightAverage:
    """Exponential moving average of those parameters of a module that are trained, by name.

    It begins with shorter averages, so that the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.weights = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After step number `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.weights.values()), [parameters[name] for name in self.weights], 1 - decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from the averages among these whole tensors."""
        for name, weight in self.weights.items():
            weight.copy_(part_of(state[name], weight))
