"""Work on files or trees of files: what to make of which, a progress bar, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..errors import AarError


@dataclass(frozen=True)
class Job:
    """One file to make of another."""

    source: Path
    target: Path


def plan(source: Path, target: Path, suffixes: Sequence[str], new_suffix: str | None) -> list[Job]:
    """What to make of `source`, a file or a tree; a tree's files keep their names, but for `new_suffix`.

    Raises:
        AarError: nothing to do, or outputs that would overwrite an input or each other.
    """

    def renamed(path: Path) -> Path:
        return path.with_suffix(new_suffix or path.suffix)

    if source.is_dir():
        if target.exists() and not target.is_dir():
            raise AarError(
                f"{target}: is a file, but {source} is a directory; name a directory to mirror it in"
            )
        files = sorted(
            path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
        )
        if not files:
            raise AarError(f"{source}: holds no file that ends in {', '.join(suffixes)}")
        jobs = [Job(path, target / renamed(path.relative_to(source))) for path in files]
    elif source.exists():
        jobs = [Job(source, target / renamed(Path(source.name)) if target.is_dir() else target)]
    else:
        raise AarError(f"{source}: no such file or directory")
    sources = {job.target: job.source for job in jobs}
    for job in jobs:
        if sources[job.target] != job.source:
            raise AarError(
                f"{job.source} and {sources[job.target]} would both become {job.target}; rename one"
            )
        if job.target.exists() and job.target.samefile(job.source):
            raise AarError(f"{job.target}: would overwrite the input; name another OUT")
    return jobs


def run(jobs: Sequence[Job], work: Callable[[Job, tqdm], None]) -> int:
    """Does every job, whichever fail. The bar counts windows, as files are found to hold them."""
    errors = []
    # Work of less than two seconds needs no bar, and a log file no ten lines a second.
    interval = 0.1 if sys.stderr.isatty() else 10
    try:
        with tqdm(total=0, unit=" windows", delay=2, mininterval=interval, dynamic_ncols=True) as bar:
            for job in jobs:
                bar.set_description(job.source.name, refresh=False)
                try:
                    work(job, bar)
                except (AarError, OSError) as error:
                    errors.append(error)
    finally:
        # Below the bar, where they stay; and also after an interruption.
        for error in errors:
            report(error)
    return 2 if errors else 0


def report(error: Exception) -> None:
    """One line: a checkpoint's differences beyond the first are for `aar info` to list."""
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    else:
        message = str(error).splitlines()[0]
    print(f"aar: {message}", file=sys.stderr)
