"""Results as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from .compare import Change, Comparison
from .rows import Loss, Results, Row

COLUMNS = ("variant", "p50 (p20, p80) ms", "ours is", "MiB", "GFLOP/s", "GB/s", "of peak")
CHANGE_COLUMNS = ("case", "shape", "threads", "now ms", "was ms", "now / was", "peers' now / was", "verdict")
LOSS_COLUMNS = ("case", "shape", "threads", "faster than ours", "by", "")
NO_LOSSES = "Nowhere among the cases measured."


def cells(row: Row) -> list[tuple[str, ...]]:
    """The numbers of each variant, as `COLUMNS` names them: one wording for every form of the report."""
    lines = []
    for label, time in row.times_ms.items():
        memory = row.extra_mib.get(label)
        lines.append((
            label,
            spread(time),
            "" if label == row.ours else f"{row.speedup(label):.1f}x",
            "" if memory is None else f"{memory:.1f}",
            f"{row.gflops(label):.1f}" if row.flops else "",
            f"{row.gbs(label):.1f}" if row.bytes else "",
            f"{row.of_peak(label):.0%}" if row.of_peak(label) else "",
        ))  # fmt: skip
    return lines


def spread(time: dict[str, float]) -> str:
    return f"{time['p50']:.3f} ({time['p20']:.3f}, {time['p80']:.3f})"


def change_cells(change: Change) -> tuple[str, ...]:
    old, new = change.old, change.new
    drift = "" if change.drift is None else f"{change.drift:.2f}"
    return (
        f"{new.benchmark}: {new.case}", new.shape, str(new.threads), spread(new.times_ms[new.ours]),
        spread(old.times_ms[old.ours]), f"{change.ratio:.2f}", drift, change.verdict,
    )  # fmt: skip


def loss_cells(loss: Loss) -> tuple[str, ...]:
    row, noise = loss.row, "within the noise" if loss.within_noise else ""
    return f"{row.benchmark}: {row.case}", row.shape, str(row.threads), loss.peer, f"{loss.times:.2f}x", noise


def header() -> str:
    return _columns("case", "shape", *COLUMNS)


def text(row: Row) -> str:
    """A line per variant, for the terminal; each stands alone, so that `grep` finds whole rows."""
    lines = [_columns(row.case, row.shape, *line) for line in cells(row)]
    return "\n".join([*lines, *(f"{row.case}, {row.shape}: without {peer}" for peer in failures(row))])


def failures(row: Row) -> list[str]:
    return [f"{label}, which failed: {why}" for label, why in row.failed.items()]


def wrong_text(wrong: dict) -> str:
    return f"WRONG {wrong['case']}, {wrong['shape']}: {wrong['why']}; not timed"


def closing_text(results: Results, comparison: Comparison | None) -> str:
    """What follows the rows on the terminal."""
    parts = ["\nwhere we lose:"]
    parts += [_loss_text(loss) for loss in results.losses()] or [NO_LOSSES]
    if comparison:
        parts += [f"\ncompared: {comparison}", *(f"NOT LIKE FOR LIKE: {what}" for what in comparison.other_machine)]
        parts += [_change_text(change) for change in comparison.changes]
    return "\n".join(parts)


def markdown(results: Results, comparison: Comparison | None = None) -> str:
    parts = ["# Kernel benchmarks", "; ".join(f"{key}: {value}" for key, value in results.machine.items())]
    if results.wrong:
        parts += ["## Wrong results, not timed", "\n".join(f"- {wrong_text(wrong)}" for wrong in results.wrong)]
    losses = [loss_cells(loss) for loss in results.losses()]
    parts += ["## Where we lose", _table(LOSS_COLUMNS, losses) if losses else NO_LOSSES]
    if comparison:
        parts += ["## Compared", str(comparison)]
        parts += [f"Not like for like: {what}" for what in comparison.other_machine]
        parts.append(_table(CHANGE_COLUMNS, map(change_cells, comparison.changes)))
    for name, rows in results.benchmarks():
        lines = [(row.case, row.shape, str(row.threads), *line) for row in rows for line in cells(row)]
        parts += [f"## {name}", _table(("case", "shape", "threads", *COLUMNS), lines)]
        parts += [f"Without {failure}" for failure in dict.fromkeys(f for row in rows for f in failures(row))]
    return "\n\n".join(parts) + "\n"


def _columns(case: str, shape: str, label: str, time: str, faster: str, *others: str) -> str:
    return f"{case:24} {shape:27} {label:24} {time:28} {faster:>8} " + " ".join(f"{other:>8}" for other in others)


def _loss_text(loss: Loss) -> str:
    noise = " (within the noise)" if loss.within_noise else ""
    return f"  {_where(loss.row)}: {loss.peer} is {loss.times:.2f}x faster{noise}"


def _change_text(change: Change) -> str:
    *_, now, was, ratio, drift, verdict = change_cells(change)
    peers = f", peers' {drift}" if drift else ""
    return f"  {verdict:6} {_where(change.new)}: {now} ms was {was}: {ratio}{peers}"


def _where(row: Row) -> str:
    return f"{row.benchmark}, {row.case}, {row.shape}, {row.threads} thread(s)"


def _table(columns: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
