"""What can be wrong with the files that users hand to `aar`; one line and exit code 2 on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["AarError", "AudioError", "CheckpointError", "TokenFileError"]


class AarError(ValueError):
    """Base of every error below. The first line of the message is complete by itself and says what to do."""


class AudioError(AarError):
    """A recording cannot be read, used or written."""


class TokenFileError(AarError):
    """A token file is truncated, corrupt, of another version, or belongs to another model."""


class CheckpointError(AarError):
    """A checkpoint does not hold what the model needs.

    Attributes:
        missing: names that the model needs and the checkpoint lacks.
        unexpected: names that the checkpoint holds and the model has no place for.
        misshaped: name -> (shape in the model, shape in the checkpoint).
    """

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ):
        self.missing, self.unexpected, self.misshaped = (
            tuple(missing),
            tuple(unexpected),
            dict(misshaped or {}),
        )
        details = [f"  missing     {name}" for name in self.missing]
        details += [f"  unexpected  {name}" for name in self.unexpected]
        details += [f"  misshaped   {name}: needs {a}, has {b}" for name, (a, b) in self.misshaped.items()]
        super().__init__("\n".join([message, *details]))

    @classmethod
    def check(cls, source: str, expected: Mapping[str, Sequence[int]], found: Mapping[str, Tensor]) -> None:
        """Raises one error that names every difference between shapes that are needed and tensors at hand."""
        missing = tuple(name for name in expected if name not in found)
        unexpected = tuple(name for name in found if name not in expected)
        misshaped = {
            name: (tuple(shape), tuple(found[name].shape))
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        }
        counts = {"missing": missing, "unexpected": unexpected, "misshaped": tuple(misshaped)}
        summary = ", ".join(
            f"{len(names)} {kind} (first: {names[0]})" for kind, names in counts.items() if names
        )
        if summary:
            raise cls(f"{source} does not fit the model: {summary}", missing, unexpected, misshaped)
