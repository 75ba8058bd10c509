"""Checkpoints of a training: files that appear whole or not at all, a bounded number of them."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..atomic import replacing
from ..errors import AarError

__all__ = ["CheckpointWriteError", "Checkpoints", "write_state"]

_NAME = re.compile(r"step-(\d+)\.pt")
_LOG = logging.getLogger("aar.training")


class CheckpointWriteError(AarError):
    """A checkpoint could not be written; those before are untouched."""


class Checkpoints:
    """``step-000001000.pt`` and so on in `directory`, the `keep` newest."""

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory, keep

    def paths(self) -> list[Path]:
        """The newest first."""
        found = [path for path in self.directory.glob("step-*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step, reverse=True)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the checkpoint, then removes those that are too many.

        Raises:
            CheckpointWriteError: no space, or any other reason not to be written.
        """
        path = self.directory / f"step-{step:09d}.pt"
        try:
            write_state(path, state)
        except OSError as error:
            last = next(iter(self.paths()), None)
            kept = f"{last.name} is whole: " if last else ""
            raise CheckpointWriteError(
                f"{path}: not written: {error.strerror or error}; {kept}make room, then go on with --resume"
            ) from error
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The state in the newest whole checkpoint, on the CPU; None if there is none. Damaged ones are logged."""
        for path in self.paths():
            try:
                # torch.load does not look at the checksums that torch.save wrote.
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
                if damaged is None:
                    # Mapped: many processes of a machine read the same file, and each may want a part of it alone.
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                reason = f"{damaged} has another checksum"
            except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
                reason = str(error).splitlines()[0]
            _LOG.warning("%s is damaged, the one before is taken: %s", path, reason)
        return None

    def clean(self) -> None:
        """Removes what a run that was killed while it wrote left behind; no run may be writing."""
        for path in self.directory.glob(".step-*.pt"):
            path.unlink(missing_ok=True)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """torch.save, whole or not at all, and on the disk when this returns.

    Raises:
        OSError: it could not be written, also where torch.save raises another error for that.
    """
    with replacing(path) as beside, open(beside, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])
