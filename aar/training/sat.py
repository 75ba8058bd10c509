"""Training of the tokenizer: reconstruction, and a discriminator that learns against it (arXiv 2408.09027)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..data import Crops, find_audio
from ..models import SAT
from .config import ConfigError, SATTraining
from .discriminator import MultiScaleSTFTDiscriminator
from .initialization import initialize_tokenizer
from .loop import Batch, Loss
from .losses import TokenizerLoss, discriminator_hinge_loss
from .usage import CodebookUsage
from .world import World

__all__ = ["SATTask", "crops"]


class SATTask:
    """Trains a `SAT` from batches with "wav" [B, 1, window_samples]; see `aar.training.loop.Task`."""

    def __init__(self, config: SATTraining, world: World):
        torch.manual_seed(config.seed)
        self.config = config
        self.model = SAT(config.model)
        if config.initial_loudness is not None:
            initialize_tokenizer(self.model, config.initial_loudness)
        self.model.to(world.device)
        self.sample_rate = config.model.sample_rate
        self.seconds_per_item = config.model.window_samples / self.sample_rate
        self.criterion = TokenizerLoss(self.sample_rate, config.losses).to(world.device)
        self.usage = CodebookUsage(config.model.schedule, config.model.codebook_size).to(world.device)
        self.players: dict[str, nn.Module] = {"tokenizer": self.model}
        self._model = world.parallel(self.model)
        self.parallel = [self._model]
        if config.discriminator.enabled:
            self.discriminator = MultiScaleSTFTDiscriminator(filters=config.discriminator.filters).to(world.device)
            self.players["discriminator"] = self.discriminator
            self._judge = world.parallel(_Judge(self.discriminator))
            self.parallel.append(self._judge)

    def prepare(self, batch: Batch) -> Batch:
        return batch

    @torch.no_grad()
    def start(self, batches: list[Batch]) -> None:
        """k-means over all batches together, as if they were one."""
        latents = [self.model.encoder(batch["wav"]) for batch in batches]
        self.model.quantizer.initialize(torch.cat(latents))

    def updating(self) -> AbstractContextManager:
        return self.model.quantizer.accumulating()

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        wav = batch["wav"]
        settings = self.config.discriminator
        adversarial = settings.enabled and step >= settings.start
        estimate, codes, commitment = self._model(wav)
        self.usage.update(codes)
        real, fake = [], []
        if adversarial:
            self.discriminator.requires_grad_(False)
            with torch.no_grad():
                real = self.discriminator(wav)
            fake = self.discriminator(estimate)
        total, **terms = self.criterion(estimate, wav, commitment, real, fake)._asdict().items()
        yield Loss("tokenizer", total[1], dict(terms))
