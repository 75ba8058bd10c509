"""What a training run is told: dataclasses, read from YAML and from ``key=value`` on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ..errors import AarError
from ..models import SATConfig
from .losses import LossWeights

__all__ = ["AARTraining", "ConfigError", "SATTraining", "TrainingConfig", "read_config"]


class ConfigError(AarError):
    """A setting that does not exist, is of the wrong kind, or cannot be."""


@dataclass(frozen=True)
class DataConfig:
    """
    Attributes:
        source: recordings, see `aar.data.find_audio`.
        held_out: others, on which the model is tried but does not learn; a folder of tokens where it learns from those.
        batch_size: items that one process holds at once.
        accumulate: such batches per step; a step sees ``batch_size * accumulate * processes`` items.
        workers: processes that read ahead, per process of the training.
        cache: folder for decoded recordings, see `aar.data.Crops`.
    """

    source: str | None = None
    held_out: str | None = None
    batch_size: int = 16
    accumulate: int = 1
    workers: int = 2
    cache: str | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """`clip` bounds the norm of all gradients together; 0: no bound. `weight_decay` spares vectors (biases, gains)."""

    kind: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate rises for `warmup` steps, then falls as a cosine to `final` times its peak at step `steps`."""

    steps: int = 400_000
    warmup: int = 1000
    final: float = 0.0


@dataclass(frozen=True)
class LoggingConfig:
    """
    Attributes:
        every: steps between losses in the log.
        held_out_every, held_out_batches: steps between trials on held-out data, and batches of each.
        sounds_every: steps between sounds; 0: none.
        wandb: a project there.
    """

    every: int = 10
    held_out_every: int = 500
    held_out_batches: int = 8
    sounds_every: int = 2000
    wandb: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """Steps between checkpoints, and how many of the newest are kept."""

    every: int = 1000
    keep: int = 3


@dataclass(frozen=True)
class DiscriminatorConfig:
    """
    Attributes:
        enabled: without it the tokenizer learns from reconstruction alone.
        filters: of each of its layers.
        start: the first step that it takes part in.
        rest: each step of whose number this is a divisor leaves it as it is; 3: it learns in two of three. 0: never.
    """

    enabled: bool = True
    filters: int = 32
    start: int = 0
    rest: int = 3


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of an AAR, see `AARConfig`; the others are its tokenizer's and its condition's."""

    depth: int = 16
    width: int = 1024
    heads: int = 16
    mlp_ratio: int = 4
    cosine_attention: bool = True
    condition_drop: float = 0.1


@dataclass(frozen=True)
class TrainingConfig:
    """What both models have in common.

    Attributes:
        seed: of weights, data and all that is drawn.
        precision: bfloat16 is automatic mixed precision; weights stay float32.
        ema: decay of the moving average of the weights, which is what the finished model holds; 0: the weights
            themselves.
    """

    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    ema: float = 0.999
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        """
        Raises:
            ConfigError: a number out of its range.
        """
        positive = ("data.batch_size", "data.accumulate", "optimizer.learning_rate", "schedule.steps", "logging.every",
                    "logging.held_out_every", "logging.held_out_batches", "checkpoint.every",
                    "checkpoint.keep")  # fmt: skip
        not_negative = ("seed", "ema", "data.workers", "optimizer.weight_decay", "optimizer.clip", "schedule.warmup",
                        "schedule.final", "logging.sounds_every")  # fmt: skip
        for name in positive + not_negative:
            value = self
            for part in name.split("."):
                value = getattr(value, part)
            if not (value >= 0 if name in not_negative else value > 0):
                least = "negative" if name in not_negative else "zero or negative"
                raise ConfigError(f"{name} must not be {least}, got {value}")
        if self.ema >= 1:
            raise ConfigError(f"ema must be below 1, got {self.ema}")


@dataclass(frozen=True)
class SATTraining(TrainingConfig):
    """
    Attributes:
        initial_loudness: where given, weights are drawn so that each layer keeps the scale of its input, and the first
            sounds have this loudness (see `aar.training.initialization`); else as PyTorch draws them.
    """

    model: SATConfig = field(default_factory=SATConfig)
    losses: LossWeights = field(default_factory=LossWeights)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    initial_loudness: float | None = None


@dataclass(frozen=True)
class AARTraining(TrainingConfig):
    """
    Attributes:
        tokens: folder that `aar tokenize` made. Else `data.source` is tokenized on the fly, by `tokenizer`.
        tokenizer: folder of a SAT, or published .pth of the published schedule.
        parallel: what each process of several holds: ddp, the whole model; fsdp, a part of its weights and of all that
            training keeps of them, for a model that is too large otherwise.
        condition: what the model is told of a sound: its acoustic embedding, its CLAP embedding, or nothing.
        clap: the CLAP model, a folder or a name on the Hugging Face hub.
    """

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig("adamw", 1e-4, (0.9, 0.95), weight_decay=0.05, clip=2.0)
    )
    model: TransformerConfig = field(default_factory=TransformerConfig)
    tokens: str | None = None
    tokenizer: str | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    condition: Literal["acoustic", "clap", "none"] = "acoustic"
    clap: str = "laion/clap-htsat-unfused"

    def __post_init__(self):
        super().__post_init__()
        if self.tokens is None and (self.tokenizer is None or self.data.source is None):
            raise ConfigError("tokens is missing (a folder that `aar tokenize` made), or tokenizer and data.source")


Config = TypeVar("Config", bound=TrainingConfig)


def read_config(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with ``dotted.key=value`` laid over it; what neither says is `kind`'s default.

    Raises:
        ConfigError: not YAML, an unknown key, a value of the wrong kind, or settings that cannot be. One line, which
            names the key and, for an unknown one, the valid key that is nearest.
        OSError: the file cannot be read.
    """
    values = _parse(path.read_text("utf-8"), str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold settings, KEY: VALUE on each line")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r} must be KEY=VALUE, as data.batch_size=8 is")
        _set(values, key, _parse(text, override))
    try:
        return kind(**_arguments(kind, values, "", _keys(kind)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _set(values: dict, key: str, value: Any) -> None:
    *folders, last = key.split(".")
    for name in folders:
        inner = values.get(name)
        values[name] = values = dict(inner) if isinstance(inner, dict) else {}
    values[last] = value


def _keys(kind: type, prefix: str = "") -> list[str]:
    """Every dotted key."""
    keys = []
    for name, hint in _hints(kind).items():
        keys += _keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind)}


def _arguments(kind: type, values: dict, prefix: str, keys: list[str]) -> dict[str, Any]:
    hints, arguments = _hints(kind), {}
    defaults = {each.name: each.default_factory for each in dataclasses.fields(kind)}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(f"{key}: unknown key; the nearest is {_nearest(key, keys)}")
        hint = hints[name]
        if not dataclasses.is_dataclass(hint):
            arguments[name] = _convert(hint, value, key)
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: must hold settings of its own, such as {_keys(hint, key + '.')[0]}")
        inner = _arguments(hint, value, f"{key}.", keys)
        try:
            arguments[name] = dataclasses.replace(defaults[name](), **inner)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
    return arguments


def _nearest(key: str, keys: list[str]) -> str:
    """By the whole dotted name or by its last part, whichever is nearer."""

    def likeness(other: str) -> float:
        pairs = (key, other), (key.rpartition(".")[2], other.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(keys, key=likeness)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as YAML gives it, as what `hint` asks for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(inner[0], value, key)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{key}: must be one of {', '.join(inner)}, got {value!r}")
        return value
    if origin is tuple:
        open_ended = inner[-1] is Ellipsis
        if not isinstance(value, list) or not (open_ended or len(value) == len(inner)):
            wanted = "a list" if open_ended else f"a list of {len(inner)}"
            raise ConfigError(f"{key}: must be {wanted}, as [1, 2] is, got {value!r}")
        return tuple(_convert(inner[0], each, key) for each in value)
    if hint is float:
        # YAML takes 3e-4 for text: it asks for a point.
        try:
            return float(value) if not isinstance(value, bool) else _refuse(key, "a number", value)
        except (TypeError, ValueError):
            _refuse(key, "a number", value)
    wanted = {int: "a whole number", bool: "true or false", str: "text"}[hint]
    return value if type(value) is hint else _refuse(key, wanted, value)


def _refuse(key: str, wanted: str, value: Any) -> typing.NoReturn:
    raise ConfigError(f"{key}: must be {wanted}, got {value!r}")
