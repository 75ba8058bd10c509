"""Models in a directory: config.json and model.safetensors; and those that come with this package, by name."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..atomic import replacing
from ..errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parents[1] / "weights"
"""Of each model that ships: NAME/README.md, its model card, and NAME/sat and NAME/aar."""

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """A module that is built from `config`, a dataclass of `config_class` with a `from_dict`.

    Attributes:
        kind: "sat" or "aar".
    """

    config_class: type
    kind: str

    def save_pretrained(self, directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and model.safetensors, each whole or not at all; makes the directory if new.

        Args:
            dtype: of the floating-point numbers in the file, float16 for half the bytes; None: as they are.

        Raises:
            ValueError: a number is beyond the range of `dtype`.
        """
        directory = Path(directory)
        state = {name: _stored(name, tensor, dtype) for name, tensor in self.state_dict().items()}
        with replacing(directory / WEIGHTS_FILE) as path:
            safetensors.torch.save_file(state, path)
        with replacing(directory / CONFIG_FILE) as path:
            path.write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls: type[Model], directory: str | os.PathLike) -> Model:
        """Reads what `save_pretrained` wrote; on the CPU, in float32, in evaluation mode.

        Args:
            directory: where it wrote, or the name of a model that ships with this package: "small".

        Raises:
            CheckpointError: a file is missing or damaged, or the weights are not those of the configuration.
        """
        directory = cls.find(directory)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory} is not a saved model: it holds no {name}")
        try:
            config = cls.config_class.from_dict(json.loads((directory / CONFIG_FILE).read_text()))
            state = safetensors.torch.load_file(directory / WEIGHTS_FILE)
            model = cls(config)
        except (ValueError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{directory} is not a saved model: {error}") from None
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        CheckpointError.check(str(directory), expected, state)
        model.load_state_dict(state)
        return model.eval()


    @classmethod
    def find(cls, name: str | os.PathLike) -> Path:
        """The directory of that path, or of the shipped model of that name where there is no such directory."""
        directory = Path(name)
        shipped = SHIPPED / directory / cls.kind
        return shipped if len(directory.parts) == 1 and not directory.is_dir() and shipped.is_dir() else directory


def shipped() -> list[str]:
    """Names of the models that come with this package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/README.md"))


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor.contiguous()
    stored = tensor.to(dtype).contiguous()
    if not torch.equal(stored.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} holds numbers beyond the range of {dtype}")
    return stored


def config_from_dict(config_class: type, values: dict):
    """The inverse of dataclasses.asdict, also through JSON.

    Raises:
        ValueError: a name that is not an attribute, or a value that the class refuses.
    """
    unknown = sorted(set(values) - set(config_class.__dataclass_fields__))
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}")
    return config_class(**values)
