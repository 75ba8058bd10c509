"""Two runs of the same cases: what became faster or slower, and what is only noise."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from .rows import Results, Row

Times = dict[str, float]


@dataclass(frozen=True)
class Change:
    """One case, before and now."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """Our time now, as a multiple of the old."""
        return self.new.p50(self.new.ours) / self.old.p50(self.old.ours)

    @property
    def drift(self) -> float | None:
        """What the peers' times did meanwhile (the median of their ratios), which we did not change: the machine, or
        the versions of other packages. None where the runs share no peer."""
        shared = [peer for peer in self.new.peers if peer in self.old.times_ms]
        return median(self.new.p50(peer) / self.old.p50(peer) for peer in shared) if shared else None

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` where the times from p20 to p80 do not overlap, neither as they were measured nor
        with the old ones moved by the drift; else ``same``."""
        old, new = self.old.times_ms[self.old.ours], self.new.times_ms[self.new.ours]
        measured = _overlap(old, new, 1.0)
        return measured if self.drift is None or _overlap(old, new, self.drift) == measured else "same"


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    other_machine: list[str]  # what differs, such as "torch: 2.10 was 2.9"
    only_old: int  # rows that the other run does not have
    only_new: int

    def count(self, verdict: str) -> int:
        return sum(change.verdict == verdict for change in self.changes)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.count(verdict)} {verdict}" for verdict in ("faster", "slower", "same"))
        return f"{counts}; {self.only_new} new, {self.only_old} no longer measured"


def compare(old: Results, new: Results) -> Comparison:
    before = {row.key: row for row in old.rows}
    changes = [Change(before[row.key], row) for row in new.rows if row.key in before]
    differ = [
        f"{key}: {value} was {old.machine.get(key)}"
        for key, value in new.machine.items()
        if key != "date" and old.machine.get(key) != value
    ]
    shared = len(changes)
    return Comparison(changes, differ, len(old.rows) - shared, len(new.rows) - shared)


def _overlap(old: Times, new: Times, drift: float) -> str:
    if new["p80"] < drift * old["p20"]:
        return "faster"
    if new["p20"] > drift * old["p80"]:
        return "slower"
    return "same"
