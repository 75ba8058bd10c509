"""Verdicts on made-up runs: a difference counts where spreads do not overlap and the machine does not explain it."""

import json
from pathlib import Path

import pytest
from report_rows import Page, results, row

from aar_kernels.bench import __main__ as command
from aar_kernels.bench import page, tables
from aar_kernels.bench.compare import compare
from aar_kernels.bench.rows import Results

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
STEADY = {"eager": (3.9, 4.0, 4.1)}
TWICE = {"eager": (7.8, 8.0, 8.2)}


@pytest.mark.parametrize(("old", "new", "verdict", "why"), [
    (row(ours=(9, 10, 11), **STEADY), row(ours=(5, 6, 7), **STEADY), "faster", "clear of the old spread"),
    (row(ours=(9, 10, 11), **STEADY), row(ours=(12, 13, 14), **STEADY), "slower", "clear of the old spread"),
    (row(ours=(9, 10, 11), **STEADY), row(ours=(10.5, 12, 13), **STEADY), "same", "spreads overlap"),
    (row(ours=(9, 10, 11), **STEADY), row(ours=(8, 8.5, 9.5), **STEADY), "same", "spreads overlap below"),
    (row(ours=(9, 10, 11), **STEADY), row(ours=(18, 20, 22), **TWICE), "same", "the machine is half as fast"),
    (row(ours=(9, 10, 11), **STEADY), row(ours=(40, 41, 42), **TWICE), "slower", "by more than the machine"),
    (row(ours=(9, 10, 11), **TWICE), row(ours=(9, 10, 11), **STEADY), "same", "measured alike"),
    (row(ours=(9, 10, 11), **TWICE), row(ours=(5, 5.2, 5.4), **STEADY), "same", "the machine is twice as fast"),
    (row(ours=(9, 10, 11), a=(1, 1, 1)), row(ours=(5, 6, 7), b=(1, 1, 1)), "faster", "no peer to tell the drift"),
    (row(ours=(9, 10, 11), a=(1, 1, 1), b=(1, 1, 1), c=(1, 1, 1)),
     row(ours=(5, 6, 7), a=(0.5, 0.5, 0.5), b=(1, 1, 1), c=(1, 1, 1)), "faster", "one peer of three improved itself"),
    (row(ours=(9, 10, 11), a=(1, 1, 1), b=(1, 1, 1), c=(1, 1, 1)),
     row(ours=(18, 19, 20), a=(2, 2, 2), b=(1, 1, 1), c=(1, 1, 1)), "slower", "one peer of three became worse"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_verdict(old, new, verdict, why):
    (change,) = compare(results(old), results(new)).changes
    assert change.verdict == verdict, why
    assert change.ratio == new.p50("ours") / old.p50("ours")


def test_rows_are_matched_by_what_they_measure():
    old = results(row(batch=1), row(batch=2), row("decode"), row(batch=1, threads=2))
    new = results(row(batch=2), row(batch=4), row(batch=1, threads=2))
    comparison = compare(old, new)
    assert all((c.new.shape, c.new.threads) == (c.old.shape, c.old.threads) for c in comparison.changes)
    assert (len(comparison.changes), comparison.only_old, comparison.only_new) == (2, 2, 1)


@pytest.fixture
def runs(tmp_path):
    paths = tmp_path / "old.json", tmp_path / "new.json"
    results(row(ours=(9, 10, 11), **STEADY)).save(paths[0])
    results(row(ours=(12, 13, 14), **STEADY)).save(paths[1])
    return [str(path) for path in paths]


def test_slower_is_an_error_only_on_request(runs, capsys):
    old, new = runs
    assert command.main(["--report", new, "--compare", old]) == 0
    assert "slower quantization, encode, batch 1" in capsys.readouterr().out
    assert command.main(["--report", new, "--compare", old, "--fail-if-slower"]) == 1
    assert command.main(["--report", old, "--compare", new, "--fail-if-slower"]) == 0


@pytest.mark.parametrize("arguments", [["--fail-if-slower"], ["--sweep", "batch"], ["--compare", "nowhere.json"]])
def test_options_that_lack_something(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    wanted = {"--fail-if-slower": "needs --compare", "--sweep": "needs --shapes sweep", "--compare": "nowhere.json"}
    assert wanted[arguments[0]] in capsys.readouterr().err


def test_the_comparison_is_in_every_form(runs):
    old, new = (Results.load([Path(path)]) for path in runs)
    old.machine["torch"] = "2.98"
    comparison = compare(old, new)
    line = ["quantization: encode", "batch 1, a<b & c", "1", "13.000 (12.000, 14.000)", "10.000 (9.000, 11.000)",
            "1.30", "1.00", "slower"]  # fmt: skip
    written = page.render(new, comparison)
    assert line in Page(written).lines
    assert "| " + " | ".join(line) + " |" in tables.markdown(new, comparison)
    for form in (written, tables.markdown(new, comparison), tables.closing_text(new, comparison)):
        assert "torch: 2.99 was 2.98" in form
        assert "0 faster, 1 slower, 0 same" in form


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_read(path):
    if "rows" not in json.loads(path.read_text()):
        with pytest.raises(ValueError, match="holds no benchmark rows"):
            Results.load([path])
        return
    found = Results.load([path])
    comparison = compare(found, found)
    assert len(comparison.changes) == len(found.rows) > 0
    assert comparison.count("same") == len(found.rows)
    lines = Page(page.render(found, comparison)).lines
    for r in found.rows:
        for label, time in r.times_ms.items():
            assert [r.case, r.shape, str(r.threads), label, tables.spread(time)] in [line[:5] for line in lines]
