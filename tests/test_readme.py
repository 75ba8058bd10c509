"""Every Python block of the README runs as it stands, in order, each in a namespace of its own."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) == 6


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block, tmp_path, monkeypatch):
    if "aar_kernels.numpy" in block:
        pytest.importorskip("aar_kernels._numpy")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {})
