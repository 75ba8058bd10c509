"""Training of the transformer, from tokens made before or from recordings on the fly (arXiv 2408.09027)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import SUFFIXES, sat_from_published
from ..models import AAR, SAT, AARConfig, SATConfig
from .config import AARTraining, ConfigError
from .loop import Batch, Loss
from .sat import crops, crops_held_out
from .sharding import shard
from .tokens import TokenSet, embedding
from .world import World

__all__ = ["AARTask"]


class AARTask:
    """Trains an `AAR` from batches with "codes" and "condition", or with "wav"; see `aar.training.loop.Task`.

    Raises:
        ConfigError: tokens that hold another condition than the configuration asks for.
        AarError: no tokens, no tokenizer, no CLAP.
    """

    def __init__(self, config: AARTraining, world: World):
        self.config, self.tokens, self.embed = config, None, None
        if config.tokens is not None:
            self.tokens = TokenSet(Path(config.tokens))
            if config.condition not in (self.tokens.condition, "none"):
                raise ConfigError(f"condition: {config.tokens} holds {self.tokens.condition}, not {config.condition}")
            tokenizer, width = self.tokens.tokenizer, self.tokens.conditions.shape[1]
        else:
            tokenizer = _open_tokenizer(Path(config.tokenizer))
            self.embed = embedding(config.condition, config.clap, tokenizer.config.sample_rate, world.device)
            width = self.embed.dim if self.embed else 0
        self.tokenizer = tokenizer.to(world.device).requires_grad_(False).eval()
        torch.manual_seed(config.seed)
        self.model = AAR(_model_config(config, tokenizer.config, width)).set_quantizer(tokenizer.quantizer)
        if config.condition != "none" and config.model.condition_drop == 0:
            self.model.null_condition.requires_grad_(False)  # which nothing is ever told of
        self.model.to(world.device)
        self.sample_rate = tokenizer.config.sample_rate
        self.seconds_per_item = tokenizer.config.window_samples / self.sample_rate
        self.players: dict[str, nn.Module] = {"transformer": self.model}
        if config.parallel == "fsdp" and world.size > 1:
            dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision]
            sizes = {"processes": world.size, "device": world.device}
            shard(self.model, self.model.blocks, self.model.quantizer, **sizes, dtype=dtype)
            self._model = self.model
        else:
            self._model = world.parallel(self.model)
        self.parallel = [self._model]

    def accepts(self, players: dict[str, dict[str, Tensor]]) -> bool:
        """Not those of another tokenizer, whose codes mean something else."""
        theirs = players["transformer"]["quantizer.codebooks"]
        return torch.equal(theirs, self.tokenizer.quantizer.codebooks.cpu())

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        if "codes" in batch:
            codes, condition = batch["codes"], batch["condition"]
        else:
            wav = batch["wav"]
            codes = self.tokenizer.quantizer.encode(self.tokenizer.encoder(wav))
            condition = self.embed.embed_audio(list(wav.squeeze(1)), self.sample_rate) if self.embed else None
        return {"codes": codes, "condition": None if self.config.condition == "none" else condition}

    def start(self, batches: list[Batch]) -> None:
        """Nothing: the codebooks are the tokenizer's."""

    def updating(self) -> AbstractContextManager:
        return contextlib.nullcontext()

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        logits, codes = self._model(batch["condition"], batch["codes"]), batch["codes"]
        total = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        right = (logits.detach().argmax(-1) == codes).float().mean()
        yield Loss("transformer", total, {"accuracy": right})

    def numbers(self) -> dict[str, float]:
        return {}

    def sounds(self, batch: Batch, model: AAR) -> dict[str, Tensor]:
        """The first sound by its own codes, one made from its condition, and one made from none."""
        batch = self.prepare({name: value[:1] for name, value in batch.items()})
        made = {"tokenized": batch["codes"], "unconditional": model.sample(num=1)}
        if batch["condition"] is not None:
            made["conditional"] = model.sample(batch["condition"])
        return {name: self.tokenizer.decode(codes[None])[0, 0] for name, codes in made.items()}

    def batches(self, world: World, start: int) -> Iterable[Batch]:
        config = self.config
        if self.tokens is None:
            return crops(config, config.data.source, self.tokenizer.config, world, start)
        return self.tokens.batches(config.data.batch_size, config.seed, world, start)

    def held_out(self, world: World) -> list[Batch]:
        """
        Raises:
            ConfigError: held-out tokens of another kind than those that are learned from.
        """
        config, count = self.config, self.config.logging.held_out_batches
        if self.tokens is None or config.data.held_out is None:
            return crops_held_out(config, self.tokenizer.config, world)
        tokens = TokenSet(Path(config.data.held_out))
        kinds = [(each.tokenizer.fingerprint(), each.condition, each.clap) for each in (tokens, self.tokens)]
        if kinds[0] != kinds[1]:
            raise ConfigError("data.held_out: made with another tokenizer or condition than tokens")
        return list(itertools.islice(tokens.batches(config.data.batch_size, config.seed, world, 0), count))


def _open_tokenizer(path: Path) -> SAT:
    return sat_from_published(path, SATConfig().lengths) if path.suffix in SUFFIXES else SAT.from_pretrained(path)


def _model_config(config: AARTraining, tokenizer: SATConfig, condition_dim: int) -> AARConfig:
    """
    Raises:
        ConfigError: sizes that no AAR can have.
    """
    names = ("lengths", "codebook_size", "latent_dim", "phi_kernel_sizes", "phi_sharing", "shared_codebook", "metric")
    shared = {name: getattr(tokenizer, name) for name in names}
    try:
        # Without conditions the width is that of the null condition alone.
        return AARConfig(**asdict(config.model), condition_dim=condition_dim or 1, **shared)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
