"""Terminal, JSON, Markdown and page say the same, of every case; the plots are drawn where the numbers are."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import pytest
from report_rows import Page, results, row

from aar_kernels.bench import __main__ as command
from aar_kernels.bench import page, plots
from aar_kernels.bench.rows import Results

ROWS = [
    row(batch=1, eager=(3.9, 4.0, 4.4), compile=(1.9, 2.0, 2.1)),
    row(batch=2, ours=(1.8, 2.0, 2.2), eager=(6.9, 7.0, 7.4), compile=(1.4, 1.5, 1.6)),
    row(batch=4, ours=(3.8, 4.0, 4.2), eager=(3.3, 3.9, 4.0), compile=(8, 9, 10)),
    row("decode & more", threads=2, ours=(0.123456, 0.2, 0.3), eager=(1, 2, 3)),
    row("decode & more", threads=2, batch=2),
]
LOST = [("batch 2, a<b & c", "compile", "1.33x", ""), ("batch 4, a<b & c", "eager", "1.03x", "within the noise")]


@pytest.fixture
def written(tmp_path, capsys):
    """The four forms of one report."""
    given = tmp_path / "given.json"
    results(*ROWS).save(given)
    paths = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "html")}
    arguments = [argument for name, path in paths.items() for argument in (f"--{name}", str(path))]
    assert command.main(["--report", str(given), *arguments]) == 0
    return {name: path.read_text() for name, path in paths.items()} | {"terminal": capsys.readouterr().out}


def _expected(json_row: dict):
    """Every line of a table that the JSON asks for, made from its raw numbers."""
    for label, time in json_row["times_ms"].items():
        seconds, ours = time["p50"] / 1e3, json_row["times_ms"]["ours"]["p50"]
        gflops, gbs = json_row["flops"] / seconds / 1e9, json_row["bytes"] / seconds / 1e9
        assert json_row["achieved"][label] == pytest.approx({"gflops": gflops, "gbs": gbs})
        part = max(gflops / json_row["peak_gflops"], gbs / json_row["peak_bandwidth"])
        yield [
            json_row["case"], json_row["shape"], str(json_row["threads"]), label,
            f"{time['p50']:.3f} ({time['p20']:.3f}, {time['p80']:.3f})",
            "" if label == "ours" else f"{time['p50'] / ours:.1f}x",
            f"{json_row['extra_mib'][label]:.1f}", f"{gflops:.1f}", f"{gbs:.1f}", f"{part:.0%}",
        ]  # fmt: skip


def test_every_number_of_the_json_is_in_every_form(written):
    lines = [line for json_row in json.loads(written["json"])["rows"] for line in _expected(json_row)]
    assert len(lines) == sum(len(r.times_ms) for r in ROWS)
    table, terminal = Page(written["html"]).lines, re.sub(" +", " ", written["terminal"])
    for line in lines:
        assert line in table
        assert "| " + " | ".join(line) + " |" in written["markdown"]
        del line[2]  # the terminal names threads above the table
        assert " ".join(filter(None, line)) in terminal


def test_where_we_lose_is_in_every_form(written):
    losses = json.loads(written["json"])["losses"]
    assert [(loss["shape"], loss["peer"], f"{loss['times']:.2f}x") for loss in losses] == [lost[:3] for lost in LOST]
    assert [loss["within_noise"] for loss in losses] == [False, True]
    table = Page(written["html"]).lines
    for shape, peer, by, noise in LOST:
        line = ["quantization: encode", shape, "1", peer, by, noise]
        assert line in table
        assert "| " + " | ".join(line) + " |" in written["markdown"]
        ending = f" ({noise})" if noise else ""
        assert f"encode, {shape}, 1 thread(s): {peer} is {by} faster{ending}\n" in written["terminal"]


def test_no_loss_is_said_too():
    assert "Nowhere among the cases measured" in page.render(results(row()))


def test_the_page_stands_alone_and_is_well_formed(written):
    parsed = Page(written["html"])
    assert not parsed.tags & {"script", "link", "img", "iframe"}
    assert "http" not in written["html"].replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "url(" not in written["html"]
    drawings = re.findall(r"<svg.*?</svg>", written["html"], re.DOTALL)
    for drawing in drawings:
        ET.fromstring(drawing)
    for heading in ("Speed-up, encode", "Speed-up, decode & more", "Roofline, 1 thread", "Roofline, 2 threads",
                    "encode over batch, dtype float32, 1 thread"):  # fmt: skip
        assert heading.lower() in map(str.lower, parsed.headings)
    assert not any("decode & more over" in heading for heading in parsed.headings)  # two points are no line


def test_wrong_results_and_failed_peers_are_shown():
    failing = dataclasses.replace(row(), failed={"flex": "RuntimeError: no <such> kernel"})
    wrong = {"benchmark": "quantization", "threads": 1, "case": "decode", "shape": "batch 3", "why": "ours is <off>"}
    found = results(failing, wrong=[wrong])
    for form in (page.render(found), command.tables.markdown(found)):
        assert "WRONG decode, batch 3: ours is" in form
        assert "flex, which failed: RuntimeError: no" in form


def test_bars_are_as_long_as_the_logarithm():
    drawing = ET.fromstring(plots.bars([("a", [("x", 2.0), ("y", 4.0), ("z", 0.5)])], [2, 4, 0.5], lambda label: label))
    rects = {r.get("class"): (float(r.get("x")), float(r.get("width"))) for r in drawing.iter() if "rect" in r.tag}
    one = float(next(r for r in drawing.iter() if "line" in r.tag).get("x1"))
    assert rects["y"][1] == pytest.approx(2 * rects["x"][1], abs=0.2)
    assert rects["x"][0] == rects["y"][0] == one
    assert rects["z"][0] + rects["z"][1] == pytest.approx(one, abs=0.2)


def test_the_roof_is_where_the_machine_ends():
    """What runs at the peak lies on the roof, on both of its sides, and what is below lies below it."""
    rates = {"memory": (1.0, 10.0), "arithmetic": (50.0, 100.0), "half": (50.0, 50.0)}
    dots = [plots.Dot(label, "", *rate) for label, rate in rates.items()]
    drawing = ET.fromstring(plots.roofline(dots, 100.0, 10.0, lambda label: label))
    at = {c.get("class"): (float(c.get("cx")), float(c.get("cy"))) for c in drawing.iter() if "circle" in c.tag}
    path = next(p for p in drawing.iter() if "polyline" in p.tag).get("points")
    (x0, y0), (x1, y1), (x2, y2) = ([float(n) for n in point.split(",")] for point in path.split())
    assert y1 == y2 == at["arithmetic"][1] < at["half"][1]
    x, y = at["memory"]
    assert x0 < x < x1 < at["arithmetic"][0] < x2
    assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=0.3)


def test_files_of_one_machine_join_and_others_do_not(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    results(ROWS[0]).save(a)
    results(ROWS[3]).save(b)
    assert [r.case for r in Results.load([a, b]).rows] == ["encode", "decode & more"]
    c.write_text(a.read_text().replace("made up", "another"))
    with pytest.raises(ValueError, match="another machine or version: cpu"):
        Results.load([a, c])
