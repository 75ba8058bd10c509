"""The microbenchmark refuses to time wrong answers, and writes what it prints."""

import json
from argparse import Namespace

import pytest
import torch

from aar_kernels.bench import __main__ as command
from aar_kernels.bench import measure, quantization, run


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


ARGUMENTS = ["quantization", "--threads", "1", "--batch", "2", "--latent", "8", "--seconds", "0", "--no-compile"]


def test_table_and_json(tmp_path):
    assert command.main([*ARGUMENTS, "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {"encode", "decode", "training step", "ResidualVQ 8 encode"} <= {row["case"] for row in rows}
    for row in rows:
        for times in row["times_ms"].values():
            assert 0 < times["p20"] <= times["p50"] <= times["p80"]
            assert times["runs"] >= 3


def test_a_wrong_answer_is_not_timed(monkeypatch, capsys):
    case = next(quantization.cases(Namespace(batch=[2], latent=[8], no_compile=True, shapes="paper", dtype=None)))

    def wrong_cases(*_):
        right = case.variants["ours"]
        case.variants["ours"] = lambda: (right() + 1) % quantization.CODES
        yield case

    monkeypatch.setattr(quantization, "cases", wrong_cases)
    monkeypatch.setattr(run, "interleaved", lambda *_, **__: pytest.fail("a wrong answer was timed"))
    assert command.main(ARGUMENTS) == 1
    assert "WRONG encode" in capsys.readouterr().out


def test_unknown_benchmark():
    with pytest.raises(SystemExit):
        command.main(["nothing"])


def test_peak_memory_sees_an_allocation():
    used = measure.peak_memory(lambda: torch.ones(16 * 2**20))
    if used is None:
        pytest.skip("no /proc/self/clear_refs")
    assert 60 < used < 70  # 64 MiB


def test_interleaved_runs_all_variants_alike():
    order = []
    measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0)
    assert order[4:] == ["a", "b"] * ((len(order) - 4) // 2)


@pytest.mark.parametrize(("patience", "runs"), [({}, 5), ({"patience": 15.0}, 3)])
def test_slow_variants_run_less_often(monkeypatch, patience, runs):
    now = iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now) * 10.0)
    order = []
    measure.interleaved({"a": lambda: order.append("a")}, seconds=1, warmup=0, **patience)
    assert len(order) == runs
