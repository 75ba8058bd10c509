"""Models in a directory: config.json and model.safetensors."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
from torch import nn

from ..atomic import replacing
from ..errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """A module that is built from `config`, a dataclass of `config_class` with a `from_dict`."""

    config_class: type

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors, each whole or not at all; makes the directory if new."""
        directory = Path(directory)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with replacing(directory / WEIGHTS_FILE) as path:
            safetensors.torch.save_file(state, path)
        with replacing(directory / CONFIG_FILE) as path:
            path.write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls: type[Model], directory: str | os.PathLike) -> Model:
        """Reads what `save_pretrained` wrote; on the CPU, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or damaged, or the weights are not those of the configuration.
        """
        directory = Path(directory)
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


def config_from_dict(config_class: type, values: dict):
    """The inverse of dataclasses.asdict, also through JSON.

    Raises:
        ValueError: a name that is not an attribute, or a value that the class refuses.
    """
    unknown = sorted(set(values) - set(config_class.__dataclass_fields__))
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}")
    return config_class(**values)
