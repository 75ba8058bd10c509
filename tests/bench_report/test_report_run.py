"""What a run does with options, wrong results, failing peers and interruptions. No time is judged."""

import json
from argparse import Namespace

import pytest
import torch
from report_rows import Page

from aar_kernels.bench import __main__ as command
from aar_kernels.bench import attention, grids, linear, modulation, quantization, run, sampling, shapes
from aar_kernels.bench.measure import Case

SMALL = ["--shapes", "small", "--threads", "1", "--seconds", "0", "--no-compile"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Peaks take a while and are of no interest here."""
    monkeypatch.setattr(run, "peak_gflops", lambda *_: 50.0)
    monkeypatch.setattr(run, "peak_bandwidth", lambda *_: 10.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measured(tmp_path):
    """Runs the command; returns its exit status and what it wrote as JSON."""

    def go(*arguments: str) -> tuple[int, dict]:
        path = tmp_path / "out.json"
        status = command.main([*arguments, *SMALL, "--json", str(path)])
        return status, json.loads(path.read_text())

    return go


OPERATORS = ("quantization", "attention", "modulation", "sampling", "linear", "transformer")


def test_operators_run_on_small_shapes_and_are_right(measured, tmp_path):
    status, found = measured(*OPERATORS, "--html", str(tmp_path / "out.html"))
    assert status == 0
    assert not found["wrong"]
    assert {row["benchmark"] for row in found["rows"]} == set(OPERATORS) <= set(command.BENCHMARKS)
    assert not any(row["failed"] for row in found["rows"])
    assert all(row["flops"] > 0 and row["bytes"] > 0 and row["sizes"] for row in found["rows"])
    lines = Page((tmp_path / "out.html").read_text()).lines
    for row in found["rows"]:
        for label in row["times_ms"]:
            assert [row["case"], row["shape"], "1", label] in [line[:4] for line in lines]


def test_dtype(measured):
    _, found = measured("modulation", "linear", "sampling", "--dtype", "bf16", "fp16")
    assert {row["sizes"].get("dtype", row["case"]) for row in found["rows"]} == {
        "bfloat16", "float16", "linear, bfloat16", "linear, bfloat16, gelu"
    }  # fmt: skip


def test_peers(measured):
    _, found = measured("attention", "--peers", "SDPA", "--dtype", "fp32")
    assert {label for row in found["rows"] for label in row["times_ms"]} == {
        "ours", "SDPA dense mask", "SDPA, concatenated"
    }  # fmt: skip


@pytest.fixture
def cases(monkeypatch):
    """Puts made-up cases in the place of the quantizer's."""

    def put(*made: Case) -> None:
        monkeypatch.setattr(quantization, "cases", lambda options: iter(made))

    return put


def _case(name: str, variants: dict, why: str = "") -> Case:
    def check() -> str:
        for go in variants.values():
            go()
        return why

    return Case(name, "batch 1", variants, check, flops=10, bytes=10, sizes={"batch": 1})


def _raise() -> None:
    raise RuntimeError("broken\nat length")


def _ran() -> int:
    return 1


def test_a_wrong_result_never_gets_a_speed(measured, cases, capsys):
    cases(_case("bad", {"ours": _ran, "eager": _ran}, "ours: off by 3"), _case("good", {"ours": _ran, "eager": _ran}))
    status, found = measured("quantization")
    assert status == 1
    assert [row["case"] for row in found["rows"]] == ["good"]
    assert [(wrong["case"], wrong["why"]) for wrong in found["wrong"]] == [("bad", "ours: off by 3")]
    assert "WRONG bad, batch 1: ours: off by 3; not timed" in capsys.readouterr().out


def test_a_peer_that_fails_is_left_out_and_named(measured, cases, capsys):
    cases(_case("good", {"ours": _ran, "eager": _ran, "flex": _raise}))
    status, found = measured("quantization")
    assert status == 0
    assert found["rows"][0]["times_ms"].keys() == {"ours", "eager"}
    assert found["rows"][0]["failed"] == {"flex": "RuntimeError: broken"}
    assert "without flex, which failed: RuntimeError: broken" in capsys.readouterr().out


def test_ours_failing_is_wrong(measured, cases):
    cases(_case("bad", {"ours": _raise, "eager": _ran}))
    status, found = measured("quantization")
    assert status == 1
    assert not found["rows"]
    assert "RuntimeError: broken" in found["wrong"][0]["why"]


def test_an_interrupted_run_leaves_what_it_had(tmp_path, monkeypatch):
    def until_stopped(options):
        yield _case("first", {"ours": _ran, "eager": _ran})
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization, "cases", until_stopped)
    with pytest.raises(KeyboardInterrupt):
        command.main(["quantization", *SMALL, "--json", str(tmp_path / "out.json")])
    assert [row["case"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["first"]


def test_compile_is_never_silently_eager(cases):
    """More shapes than the limit of recompilations are an error, not eager under another name."""
    run.COMPILER.update(recompile_limit=1)
    try:
        compiled = torch.compile(lambda x, k: x + k, dynamic=False, backend="eager")
        cases(*(_case(str(k), {"ours": _ran, "compile": lambda k=k: compiled(torch.zeros(2), k)}) for k in range(3)))
        options = Namespace(device="cpu", threads=[1], seconds=0.0, peers=None)
        rows = list(run.run(["quantization"], options, lambda title: None))
    finally:
        run.COMPILER.update(recompile_limit=64)
        torch._dynamo.reset()
    assert "compile" in rows[0].times_ms
    assert "RecompileLimit" in rows[-1].failed["compile"]


@pytest.mark.parametrize("module", [quantization, attention, modulation, sampling])
def test_a_sweep_changes_one_size_at_a_time(module):
    options = Namespace(shapes="sweep", sweep=None, batch=[1, 2, 4], latent=[32, 64, 128])
    every = [vars(sizes) for sizes in module._sizes(options)]
    values = {name: {sizes[name] for sizes in every} for name in every[0]}
    swept = [name for name in values if len(values[name]) > 1]
    assert "batch" in swept
    usual = {name: max(values[name], key=[sizes[name] for sizes in every].count) for name in values if name != "batch"}
    for sizes in every:
        assert sum(sizes[name] != usual[name] for name in usual) <= 1
    assert len({tuple(sizes.values()) for sizes in every}) == len(every)
    assert all(len(values[name]) >= 3 for name in swept)
    options.sweep = ["batch"]
    assert {sizes.batch for sizes in module._sizes(options)} == {1, 2, 4}
    assert len(module._sizes(options)) == 3


def test_linear_sweeps_its_rows():
    options = Namespace(shapes="sweep", sweep=None, dtype=["int8"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LAYERS", [(64, 64, None)] * 3)
        patch.setattr(linear, "WORKING_SET", 2**16)
        assert [case.sizes["rows"] for case in linear.cases(options)] == list(linear.SWEPT_ROWS)
        options.sweep = ["batch"]
        assert not list(linear.cases(options))


def test_names_of_shapes_say_what_is_unusual():
    base = quantization.Sizes()
    assert base.name == "batch 8, latent 64"
    assert quantization.Sizes(batch=2, codes=4096).name == "batch 2, latent 64, codes 4096"
    assert shapes.others(quantization.Sizes(scales=4), base) == ", scales 4"


def test_grids_refuse_a_wrong_answer():
    options = Namespace(batch=[2], no_compile=True, shapes="small")
    cases = list(grids.cases(options))
    assert [case.name for case in cases] == ["VAR encode", "VAR decode", "VAR next scale inputs"]
    for case in cases:
        assert list(case.variants) == ["ours", "eager"]
        assert case.check() == ""
        right = case.variants["ours"]
        case.variants["ours"] = lambda right=right: right() + 1
        assert case.check().startswith("ours: ")
