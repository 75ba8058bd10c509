"""What was measured, as data: one row per case, with what follows from its numbers, and the file that holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """The times of one case's variants, the library's own first."""

    benchmark: str
    threads: int
    case: str
    shape: str
    times_ms: dict[str, dict[str, float]]  # of each variant: p20, p50, p80 and the number of runs
    flops: int = 0  # useful operations, and bytes that must at least move; 0 where nobody counted
    bytes: int = 0
    peak_gflops: float = 0.0  # of the machine, measured just before
    peak_bandwidth: float = 0.0  # GB/s
    extra_mib: dict[str, float | None] = field(default_factory=dict)
    sizes: dict[str, int | str] = field(default_factory=dict)  # the shape, size by size
    device: str = "cpu"
    failed: dict[str, str] = field(default_factory=dict)  # peers that could not run the case, and why

    @classmethod
    def of(cls, numbers: dict) -> Row:
        """From JSON. Older files lack some fields; the count of those that have one for each variant is not read."""
        counted = {name for name in ("flops", "bytes") if isinstance(numbers.get(name), dict)}
        known = {f.name for f in fields(cls)} - counted
        return cls(**{name: value for name, value in numbers.items() if name in known})

    def numbers(self) -> dict:
        """For JSON, with the achieved rates."""
        achieved = {label: {"gflops": self.gflops(label), "gbs": self.gbs(label)} for label in self.times_ms}
        return asdict(self) | {"achieved": achieved}

    @property
    def key(self) -> tuple:
        """What a row of another run is compared by."""
        return self.device, self.benchmark, self.threads, self.case, self.shape

    @property
    def ours(self) -> str:
        return next(iter(self.times_ms))

    @property
    def peers(self) -> list[str]:
        return [label for label in self.times_ms if not label.startswith("ours")]

    def p50(self, label: str) -> float:
        return self.times_ms[label]["p50"]

    def speedup(self, label: str) -> float:
        """How many times faster ours is."""
        return self.p50(label) / self.p50(self.ours)

    def gflops(self, label: str) -> float:
        return self.flops / self.p50(label) / 1e6

    def gbs(self, label: str) -> float:
        return self.bytes / self.p50(label) / 1e6

    def of_peak(self, label: str) -> float:
        """Part of the peak that bounds the case: of arithmetic, or of memory."""
        return max(
            self.gflops(label) / self.peak_gflops if self.peak_gflops else 0.0,
            self.gbs(label) / self.peak_bandwidth if self.peak_bandwidth else 0.0,
        )


@dataclass(frozen=True)
class Loss:
    """A case in which a peer is faster than ours."""

    row: Row
    peer: str

    @property
    def times(self) -> float:
        """How many times faster the peer is."""
        return 1 / self.row.speedup(self.peer)

    @property
    def within_noise(self) -> bool:
        """Whether the times overlap from p20 to p80."""
        return self.row.times_ms[self.peer]["p80"] >= self.row.times_ms[self.row.ours]["p20"]

    def numbers(self) -> dict:
        row = self.row
        return {
            "device": row.device, "benchmark": row.benchmark, "threads": row.threads, "case": row.case,
            "shape": row.shape, "peer": self.peer, "times": self.times, "within_noise": self.within_noise,
        }  # fmt: skip


@dataclass
class Results:
    """A run, or what several runs on one machine left."""

    machine: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    wrong: list[dict] = field(default_factory=list)  # cases that were not timed: benchmark, threads, case, shape, why

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Results:
        """Raises:
        ValueError: a file that holds no rows, or files of different machines or versions.
        """
        together = cls()
        for path in paths:
            numbers = json.loads(path.read_text())
            if "rows" not in numbers:
                raise ValueError(f"{path} holds no benchmark rows")
            machine = numbers["machine"]
            other = [k for k in machine if k != "date" and together.machine.get(k, machine[k]) != machine[k]]
            if other:
                raise ValueError(f"{path} is of another machine or version: {', '.join(other)} differ")
            together.machine = machine
            together.rows += map(Row.of, numbers["rows"])
            together.wrong += numbers.get("wrong", [])
        return together

    def save(self, path: Path) -> None:
        """Whole or not at all, so that a run which is stopped leaves what it had."""
        numbers = {
            "machine": self.machine, "rows": [row.numbers() for row in self.rows], "wrong": self.wrong,
            "losses": [loss.numbers() for loss in self.losses()],
        }  # fmt: skip
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(numbers, indent=1) + "\n")
        os.replace(part, path)

    def losses(self) -> list[Loss]:
        """Where we lose: every case and peer that is faster, the worst first."""
        found = [Loss(row, peer) for row in self.rows for peer in row.peers if row.speedup(peer) < 1]
        return sorted(found, key=lambda loss: -loss.times)

    def benchmarks(self) -> Iterator[tuple[str, list[Row]]]:
        for name in dict.fromkeys(row.benchmark for row in self.rows):
            yield name, [row for row in self.rows if row.benchmark == name]
