"""What is known of a recording before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Recording"]


@dataclass(frozen=True)
class Recording:
    """A file of sound, a part of one, or a member of a tar shard.

    Attributes:
        path: the file, or the shard.
        start: where the part begins, in seconds.
        duration: of the part, in seconds; None: to the end of the file.
        label: what the data calls it; "" where it says nothing.
        member: name inside the shard; "" for a file.
        offset, size: bytes of the member inside the shard; size None: the whole file.
    """

    path: Path
    start: float = 0.0
    duration: float | None = None
    label: str = ""
    member: str = ""
    offset: int = 0
    size: int | None = None

    def __str__(self) -> str:
        return f"{self.member} in {self.path}" if self.member else str(self.path)
