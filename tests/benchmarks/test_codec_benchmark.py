"""The benchmark of whole codecs: it compares waves and codes, and times only what is right."""

import json

import pytest
import torch

from aar import SAT, SATConfig
from benchmarks import codec, onnx_peer

TINY = SATConfig(n_filters=2, ratios=(4, 2), lengths=(1, 3, 9), dim=12, latent_dim=6, lstm_layers=1, codebook_size=20)
ARGUMENTS = ["--codec", "small", "--threads", "1", "--batch", "2", "--runs", "1", "--no-compile"]


def test_table_and_json(quick, tmp_path):
    path = tmp_path / "out.json"
    assert codec.main([*ARGUMENTS, "--layers", "--cpu-time", "--json", str(path)], TINY) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == 2 * ["SAT small encode"] + 2 * ["SAT small decode"]
    whole, layers = rows[0], rows[1]
    assert set(whole["times_ms"]) == {
        "ours", "eager autoencoder, our quantizer", "eager", "eager, weight norm",
    }  # fmt: skip
    assert whole["clock"] == "process_time"
    assert len(layers["times_ms"]) == 7
    assert whole["flops"] > 2 * 2 * 72 * 7 * 2


@pytest.mark.parametrize("name", ["ours", "eager autoencoder, our quantizer"])
def test_a_wrong_answer_is_not_timed(quick, monkeypatch, capsys, name):
    halves = list(codec._halves(["small"], True, TINY))
    for half in halves:
        right = half.variants[name]
        half.variants[name] = lambda x, right=right: 1 + right(x)
    monkeypatch.setattr(codec, "_halves", lambda *_: halves)
    timed = []
    monkeypatch.setattr(codec, "_measure", lambda half, *_: timed.append(set(half.variants)) or {"times_ms": {}})
    monkeypatch.setattr(codec, "print_row", lambda row: None)
    assert codec.main(ARGUMENTS) == 1
    assert f"WRONG SAT small encode, {name}: 100.0% other codes; not timed" in capsys.readouterr().out
    assert all(name not in variants for variants in timed)
    assert len(timed) == 2


def test_flops_of_the_published_encoder():
    """3.46 GFLOP for one second, counted by hand in benchmarks/NOTES.md."""
    flops, steps = 0, 24000
    for part in codec._packed(SAT(SATConfig()).encoder):
        flops += codec._flops(part, steps)
        steps = codec._steps(part, steps)
    assert flops == pytest.approx(3.461e9, rel=1e-3)
    assert steps == 75


@pytest.mark.parametrize(("name", "gflop"), [("encodec48", (5.5, 7)), ("mimi", (2, 6)), ("dac", (55, 150))])
def test_stacks_of_transformers(name, gflop):
    """Published sizes: what the layers of one second cost, and that every variant has the input it takes."""
    for half in codec._halves([name], True, None):
        length, flops = half.steps, 0
        for part in codec._packed(half.network):
            flops += codec._flops(part, length)
            length = codec._steps(part, length)
        assert gflop[0] < flops / 1e9 < gflop[1], flops
        assert half.input(2).shape[0] == 2
        assert list(half.variants)[:2] == ["ours", "eager"]


@torch.no_grad()
def test_onnx_runtime():
    """A peer where it is installed: any batch, and the network's own numbers."""
    if onnx_peer.missing():
        pytest.skip(f"not installed: {', '.join(onnx_peer.missing())}")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.ELU())
    run = onnx_peer.onnx_runtime(network, torch.randn(1, 2, 20))
    x = torch.randn(3, 2, 20)
    torch.testing.assert_close(run(x), network(x))
