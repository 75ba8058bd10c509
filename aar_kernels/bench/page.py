"""Results as a web page: one file without scripts, plots and all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from html import escape

from . import plots, tables
from .compare import Comparison
from .rows import Results, Row

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8d8de, #3a3a42); --soft: light-dark(#5c5c66, #a5a5b0);
        --card: light-dark(#fff, #1d1d22); --bad: light-dark(#b3261e, #ff8a80); }
* { box-sizing: border-box; }
body { max-width: 1500px; margin: 0 auto; padding: 1.5rem 1rem 4rem; font: 15px/1.5 system-ui, sans-serif;
       background: light-dark(#f6f6f8, #131316); }
h1 { margin: 0; font-size: 1.6rem; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.25rem; }
h2::first-letter, h3::first-letter { text-transform: uppercase; }
h3 { margin: 0 0 .4rem; font-size: .95rem; } p { max-width: 80ch; margin: .5rem 0; }
.soft { color: var(--soft); fill: var(--soft); } .bad { color: var(--bad); font-weight: bold; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: .8rem;
         align-items: start; margin: .8rem 0; }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
.table { overflow-x: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 8px;
         background: var(--card); margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; width: 100%; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); }
.left { text-align: left; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .6rem 0; padding: 0; list-style: none; }
.legend svg { width: 12px; height: 12px; vertical-align: -1px; margin-right: .35rem; }
.plots svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: currentColor; }
svg .bad { fill: var(--bad); } svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: var(--line); stroke-width: .6; } svg .axis { stroke: currentColor; stroke-width: .8; }
svg .roof { stroke: currentColor; stroke-width: 1.5; fill: none; }
svg .line { fill: none; stroke-width: 1.6; }
.c0 { fill: light-dark(#c2185b, #ff5c93); } .line.c0 { stroke: light-dark(#c2185b, #ff5c93); }
.c1 { fill: light-dark(#5f6b7a, #9aa7b8); } .line.c1 { stroke: light-dark(#5f6b7a, #9aa7b8); }
.c2 { fill: light-dark(#1f77b4, #5fb0ea); } .line.c2 { stroke: light-dark(#1f77b4, #5fb0ea); }
.c3 { fill: light-dark(#2e8b57, #62c98f); } .line.c3 { stroke: light-dark(#2e8b57, #62c98f); }
.c4 { fill: light-dark(#d98a00, #f2b84b); } .line.c4 { stroke: light-dark(#d98a00, #f2b84b); }
.c5 { fill: light-dark(#7b4fb3, #b795e6); } .line.c5 { stroke: light-dark(#7b4fb3, #b795e6); }
.c6 { fill: light-dark(#8c564b, #c99a8e); } .line.c6 { stroke: light-dark(#8c564b, #c99a8e); }
.c7 { fill: light-dark(#00868b, #4fd0d4); } .line.c7 { stroke: light-dark(#00868b, #4fd0d4); }
.c8 { fill: light-dark(#8a8a00, #d2d24f); } .line.c8 { stroke: light-dark(#8a8a00, #d2d24f); }
"""
TEXT = {"case", "shape", "variant", "faster than ours", "verdict"}  # columns that are not numbers
BARS = 12  # rows of a case in one plot of bars; more go into a plot beside it
Colour = Callable[[str], str]


def render(results: Results, comparison: Comparison | None = None) -> str:
    parts = ["<h1>Kernel benchmarks</h1>", _machine(results)]
    if results.wrong:
        parts.append("<h2>Wrong results, not timed</h2>")
        parts += [_paragraph(tables.wrong_text(wrong), "bad") for wrong in results.wrong]
    losses = [tables.loss_cells(loss) for loss in results.losses()]
    parts.append("<h2>Where we lose</h2>")
    parts.append(_table(tables.LOSS_COLUMNS, losses) if losses else _paragraph(tables.NO_LOSSES))
    if comparison:
        parts += ["<h2>Compared</h2>", _paragraph(str(comparison))]
        parts += [_paragraph(f"Not like for like: {what}", "bad") for what in comparison.other_machine]
        parts.append(_table(tables.CHANGE_COLUMNS, map(tables.change_cells, comparison.changes)))
    for name, rows in results.benchmarks():
        parts += _benchmark(name, rows)
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Kernel benchmarks</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n<body>\n{body}\n'
        "</body></html>\n"
    )


def _machine(results: Results) -> str:
    about = "; ".join(f"{key}: {value}" for key, value in results.machine.items())
    return _paragraph(about, "soft") + _paragraph(
        "Times are medians of runs in turn in one process, with the 20th and 80th percentile. Rates count useful "
        "operations and the bytes that must at least move, against the fastest matrix product and the fastest pass "
        "over memory of the same run. More than all of a peak is possible: a cache is faster than memory, and a kernel "
        "may get by with fewer operations than were counted, or with narrower numbers."
    )


def _benchmark(name: str, rows: Sequence[Row]) -> list[str]:
    labels = list(dict.fromkeys(label for row in rows for label in row.times_ms))
    colour = plots.colours(labels)
    figures = [_figure(f"speed-up, {case}", svg) for case, svg in _bars(rows, colour)]
    figures += [_figure(f"roofline, {what}", svg) for what, svg in _rooflines(rows, colour)]
    figures += [_figure(what, svg) for what, svg in _sweeps(rows, colour)]
    lines = [(row.case, row.shape, str(row.threads), *line) for row in rows for line in tables.cells(row)]
    failures = dict.fromkeys(failure for row in rows for failure in tables.failures(row))
    return [
        f"<h2>{escape(name)}</h2>",
        _legend(labels, colour),
        '<div class="plots">', *figures, "</div>",
        _table(("case", "shape", "threads", *tables.COLUMNS), lines),
        *(_paragraph(f"Without {failure}") for failure in failures),
    ]  # fmt: skip


def _bars(rows: Sequence[Row], colour: Colour) -> Iterable[tuple[str, str]]:
    for case in dict.fromkeys(row.case for row in rows):
        groups = [
            (f"{row.shape}, {_threads(row)}", [(peer, row.speedup(peer)) for peer in row.peers])
            for row in rows if row.case == case and row.peers
        ]  # fmt: skip
        values = [value for _, peers in groups for _, value in peers]
        for i in range(0, len(groups), BARS):
            yield case, plots.bars(groups[i : i + BARS], values, colour)


def _rooflines(rows: Sequence[Row], colour: Colour) -> Iterable[tuple[str, str]]:
    """One for each number of threads, under the highest peaks that were measured with it."""
    for threads in dict.fromkeys(_threads(row) for row in rows):
        counted = [row for row in rows if _threads(row) == threads and row.flops and row.bytes and row.peak_bandwidth]
        dots = [
            plots.Dot(label, f"{row.case}, {row.shape}", row.flops / row.bytes, row.gflops(label))
            for row in counted for label in row.times_ms
        ]  # fmt: skip
        if dots:
            peak = max(row.peak_gflops for row in counted)
            bandwidth = max(row.peak_bandwidth for row in counted)
            yield threads, plots.roofline(dots, peak, bandwidth, colour)


def _sweeps(rows: Sequence[Row], colour: Colour) -> Iterable[tuple[str, str]]:
    """Lines over each size that takes three values or more while all others stay."""
    for size in dict.fromkeys(name for row in rows for name, value in row.sizes.items() if isinstance(value, int)):
        families = defaultdict(list)
        for row in rows:
            if size in row.sizes:
                rest = ", ".join(f"{name} {value}" for name, value in row.sizes.items() if name != size)
                families[row.case, rest, _threads(row)].append(row)
        for (case, rest, threads), family in families.items():
            family.sort(key=lambda row: row.sizes[size])
            if len({row.sizes[size] for row in family}) < 3:
                continue
            labels = dict.fromkeys(label for row in family for label in row.times_ms)
            series = [plots.Line(label, _points(family, size, label)) for label in labels]
            title = ", ".join(filter(None, (f"{case} over {size}", rest, threads)))
            yield title, plots.lines(series, size, "ms", colour)


def _points(rows: Sequence[Row], size: str, label: str) -> list[tuple[float, float, float, float]]:
    times = [(row.sizes[size], row.times_ms[label]) for row in rows if label in row.times_ms]
    return [(value, time["p20"], time["p50"], time["p80"]) for value, time in times]


def _threads(row: Row) -> str:
    return f"{row.threads} thread" + ("s" if row.threads > 1 else "")


def _legend(labels: Iterable[str], colour: Colour) -> str:
    swatch = '<svg viewBox="0 0 12 12"><rect class="{}" width="12" height="12" rx="2"/></svg>'
    return '<ul class="legend">' + "".join(
        f"<li>{swatch.format(colour(label))}{escape(label)}</li>" for label in labels
    ) + "</ul>"  # fmt: skip


def _figure(title: str, svg: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{svg}</figure>"


def _paragraph(text: str, name: str = "") -> str:
    return f'<p class="{name}">{escape(text)}</p>'


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    places = [' class="left"' if column in TEXT else "" for column in columns]

    def line(cells: Iterable[str], tag: str) -> str:
        pairs = zip(places, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{place}>{escape(cell)}</{tag}>" for place, cell in pairs) + "</tr>"

    body = "\n".join(line(cells, "td") for cells in lines)
    return (
        f'<div class="table"><table><thead>{line(columns, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )
