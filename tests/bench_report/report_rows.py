"""Made-up results, and a reader of the page."""

from __future__ import annotations

from html.parser import HTMLParser

from aar_kernels.bench.rows import Results, Row

VOID = {"meta", "rect", "line", "circle", "polyline"}


def times(p20: float, p50: float, p80: float) -> dict[str, float]:
    return {"p20": p20, "p50": p50, "p80": p80, "runs": 9}


def row(case: str = "encode", *, ours=(0.9, 1.0, 1.1), batch: int = 1, threads: int = 1, **peers) -> Row:
    """A row of 8 MFLOP and 2 MB under peaks of 50 GFLOP/s and 10 GB/s."""
    every = {"ours": ours, **(peers or {"eager": (3.9, 4.0, 4.4)})}
    return Row(
        "quantization", threads, case, f"batch {batch}, a<b & c", {label: times(*t) for label, t in every.items()},
        flops=8_000_000, bytes=2_000_000, peak_gflops=50.0, peak_bandwidth=10.0,
        extra_mib=dict.fromkeys(every, 1.25), sizes={"batch": batch, "dtype": "float32"},
    )  # fmt: skip


def results(*rows: Row, **others) -> Results:
    return Results({"cpu": "made up", "torch": "2.99", "date": "2030-01-01"}, list(rows), **others)


class Page(HTMLParser):
    """Checks that tags nest; keeps the lines of all tables, the headings, and the names of all tags."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.lines, self.headings = [], set(), [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")
        if tag in ("h2", "h3"):
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        if tag not in VOID or (self.open and self.open[-1] == tag):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.lines[-1][-1] += data
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings[-1] += data
