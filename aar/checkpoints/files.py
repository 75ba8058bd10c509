"""What both kinds of checkpoint have in common: a table of tensors in a .pth file, perhaps wrapped."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError

SUFFIXES = (".pth", ".pt")

Source = str | os.PathLike | Mapping[str, Tensor]


def read_tensors(source: Source, wrapper: str, what: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file or of a table in memory, without ``module.`` prefixes, and what to call the source.

    Args:
        wrapper: the entry that holds the tensors where the file holds more.
        what: is expected, for the message: "a SAT checkpoint".

    Raises:
        CheckpointError: no table of tensors.
        OSError: the file does not exist or may not be read.
    """
    in_memory = isinstance(source, Mapping)
    name, state = ("the checkpoint", source) if in_memory else (str(source), _load(source))
    if isinstance(state, Mapping) and wrapper in state:
        state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        other = f": it holds {', '.join(map(str, list(state)[:5]))}" if isinstance(state, Mapping) else ""
        raise CheckpointError(f"{name} is not {what} ({wrapper} or a table of tensors){other}")
    return {key.removeprefix("module."): value for key, value in state.items()}, name


def shape_of(state: Mapping[str, Tensor], key: str, rank: int, wrong: str) -> tuple[int, ...]:
    """The shape of a tensor that a size is read off; ``wrong`` begins the message where it is not there."""
    if key not in state or state[key].dim() != rank:
        state_of_it = "missing" if key not in state else f"of shape {tuple(state[key].shape)}"
        raise CheckpointError(f"{wrong}: {key}, which tells sizes, is {state_of_it}", (key,))
    return tuple(state[key].shape)


def _load(path: str | os.PathLike) -> Mapping:
    with open(path, "rb"):
        pass  # a file that cannot be opened has its own errors; those below are about what is in it
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError):
        raise CheckpointError(
            f"{path}: damaged, no PyTorch checkpoint, or one of more than tensors, which is not loaded"
        ) from None
