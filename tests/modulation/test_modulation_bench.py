"""The benchmark's variants agree, and it says what it measured."""

import json

import torch

from aar_kernels.bench import __main__ as command


def test_table_and_json(tmp_path):
    threads = torch.get_num_threads()
    arguments = ["modulation", "--threads", "1", "--batch", "1", "--seconds", "0", "--no-compile"]
    assert command.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        assert row["times_ms"].keys() == {"ours", "eager"}
        assert row["bytes"] >= 2 * 455 * 1024 * 2
        assert row["peak_bandwidth"] > 0
