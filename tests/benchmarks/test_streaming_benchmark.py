"""The benchmark of streams: it compares with the whole signal, and times only what is right."""

import json

import pytest
import torch

from benchmarks import streaming

ARGUMENTS = ["--codec", "encodec", "--threads", "1", "--runs", "1", "--cpu-time"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(streaming, "read_bandwidth", lambda: 10.0)
    monkeypatch.setitem(streaming.FRAMES, "encodec", (1.0, {"encoder": 8, "decoder": 1}))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small(codec: str) -> torch.nn.ModuleDict:
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(num_filters=4, hidden_size=16, upsampling_ratios=[4, 2], num_lstm_layers=1)
    model = transformers.EncodecModel(config)
    return torch.nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})


def test_table_and_json(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert streaming.main([*ARGUMENTS, "--json", str(path)], small) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["EnCodec 24 kHz encoder", "EnCodec 24 kHz decoder"]
    assert all(list(row["times_ms"]) == ["ours", "PyTorch, layer by layer"] for row in rows)
    assert "of real time" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed(monkeypatch, capsys):
    class Wrong(streaming.Stream):
        def __call__(self, x):
            return super().__call__(x) * 1.001

    monkeypatch.setattr(streaming, "Stream", Wrong)
    assert streaming.main(ARGUMENTS, small) == 1
    out = capsys.readouterr().out
    assert "WRONG EnCodec 24 kHz encoder, ours: off by" in out
    assert "\nours" not in out
