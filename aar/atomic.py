"""Files that appear whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a fresh path beside `path`, with the same suffix; renames it over `path` if the block succeeds.

    If the block raises, the file beside is removed and whatever was at `path` stays as it was. Folders that
    are missing on the way to `path` are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside, since a rename is atomic only within one file system; random, since two processes may
    # write `path`.
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
