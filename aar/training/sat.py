"""Training of the tokenizer: reconstruction, and a discriminator that learns against it (arXiv 2408.09027)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..data import Crops, find_audio
from ..models import SAT, SATConfig
from .config import ConfigError, SATTraining, TrainingConfig
from .discriminator import MultiScaleSTFTDiscriminator
from .initialization import initialize_tokenizer
from .loop import Batch, Loss
from .losses import TokenizerLoss, discriminator_hinge_loss
from .usage import CodebookUsage
from .world import World

__all__ = ["SATTask", "crops", "crops_held_out"]


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

    def accepts(self, players: dict[str, dict[str, Tensor]]) -> bool:
        return True

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
        if self.model.training:
            self.usage.update(codes)
        real, fake = [], []
        if adversarial:
            self.discriminator.requires_grad_(False)  # it learns from its own loss alone
            with torch.no_grad():
                real = self.discriminator(wav)
            fake = self.discriminator(estimate)
            self.discriminator.requires_grad_(True)
        terms = self.criterion(estimate, wav, commitment, real, fake)._asdict()
        if not adversarial:
            del terms["adversarial"], terms["feature_matching"]
        yield Loss("tokenizer", terms.pop("total"), terms)
        if adversarial and (not settings.rest or step % settings.rest):
            yield Loss("discriminator", self._judge(wav, estimate.detach()), {})

    def numbers(self) -> dict[str, float]:
        return {"codes in use": self.usage.part()}

    def sounds(self, batch: Batch, model: SAT) -> dict[str, Tensor]:
        """The first wave as recorded, and by the coarsest half of the scales and all of them."""
        wav, scales = batch["wav"][:1], model.num_scales
        kept = sorted({max(scales // 2, 1), scales})
        heard = model.reconstruct_scales(wav, kept)
        return {"recorded": wav[0, 0]} | {f"{k} scales": wave[0, 0] for k, wave in zip(kept, heard, strict=True)}

    def batches(self, world: World, start: int) -> Iterable[Batch]:
        """Raises ConfigError without `data.source`."""
        return crops(self.config, self.config.data.source, self.config.model, world, start)

    def held_out(self, world: World) -> list[Batch]:
        return crops_held_out(self.config, self.config.model, world)


class _Judge(nn.Module):
    """The discriminator's loss as one forward pass, which is what data-parallel training counts."""

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, recorded: Tensor, made: Tensor) -> Tensor:
        return discriminator_hinge_loss(self.discriminator(recorded), self.discriminator(made))


def crops(config: TrainingConfig, source: str | None, model: SATConfig, world: World, start: int) -> Crops:
    """Windows of recordings for a tokenizer, from batch number `start` on.

    Raises:
        ConfigError: no source is given.
        AarError: nothing in it can be used.
    """
    data = config.data
    if source is None:
        raise ConfigError("data.source is missing: a folder, list or manifest of recordings")
    return Crops(
        find_audio(source), sample_rate=model.sample_rate, samples=model.window_samples, batch_size=data.batch_size,
        seed=config.seed, workers=data.workers, rank=world.rank, world=world.size, start=start, cache=data.cache,
    )  # fmt: skip


def crops_held_out(config: TrainingConfig, model: SATConfig, world: World) -> list[Batch]:
    """The first batches of `data.held_out`, none without it."""
    if config.data.held_out is None:
        return []
    found = crops(config, config.data.held_out, model, world, 0)
    return list(itertools.islice(found, config.logging.held_out_batches))
