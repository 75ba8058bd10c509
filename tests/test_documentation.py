"""Every block of code in the README and in docs/ runs as it stands, and every link leads somewhere.

A block of the README has a namespace of its own; the blocks of a page in docs/ follow each other in one.
`<!-- needs X -->` above a block skips the rest of its page where X cannot be imported. A block whose first line is a
comment with a path is a file: the kernel page's files are put into a copy of the sources, built and tested there.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import require

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"(?:<!-- needs ([\w.]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"(?:#|//) (\S+/\S+\.\w+)\n")


class Block(NamedTuple):
    needs: str
    language: str
    code: str

    @property
    def path(self) -> str | None:
        """Of the file that the block is."""
        found = PATH.match(self.code)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    return [Block(*found.groups("")) for found in FENCE.finditer(page.read_text())]


def _programs() -> list:
    """What runs in one namespace: lists of blocks, each with a name."""
    programs = []
    for page in PAGES:
        code = [block for block in blocks(page) if block.language == "python" and not block.path]
        if page == README:
            programs += [pytest.param([block], id=f"README-{i}") for i, block in enumerate(code)]
        elif code and page.name != "codec.md":  # which has a test of its own
            programs.append(pytest.param(code, id=page.stem))
    return programs


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path, monkeypatch):
    """Files go to a directory of the test; the number of threads is put back."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("program", _programs())
def test_code_runs(program):
    _run(program)


def _run(program: list[Block], namespace: dict | None = None) -> dict:
    namespace = {"__name__": "page"} if namespace is None else namespace
    for i, block in enumerate(program):
        if block.needs:
            _require(block.needs)
        exec(compile(block.code, f"block {i}", "exec"), namespace)
    return namespace


def _require(name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{name}: {error}")


def test_the_codec_of_the_page_learns(capsys):
    """From crops that it is not judged by: better than at first, than silence, and than with codes of other sounds."""
    first, *others = blocks(DOCS / "codec.md")
    namespace = _run([first])
    steps, distances = zip(*(map(float, line.split()) for line in capsys.readouterr().out.splitlines()), strict=True)
    assert steps == (0, 30, 60, 90)
    wav, codec, distance = (namespace[name] for name in ("held_out", "codec", "distance"))
    codes = codec.encode(wav)
    mine, others_codes = distance(codec.decode(codes), wav), distance(codec.decode(codes.roll(1, 0)), wav)
    assert mine == pytest.approx(distances[-1])
    assert mine < 0.85 * distances[0]
    assert mine < 0.75 * distance(torch.zeros_like(wav), wav)
    assert mine < 0.93 * others_codes
    assert codes.unique().numel() > 64  # of 256
    _run(others, namespace)


def test_the_kernel_of_the_page_is_built_and_right(tmp_path):
    """In a copy of the sources that has no other operator's kernels, so that building takes seconds."""
    require("linear_forward", "native")  # there is a compiler
    files = {block.path: block.code for block in blocks(DOCS / "kernel.md") if block.path}
    assert {Path(path).suffix for path in files} == {".py", ".h", ".cpp"}
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    shutil.copytree(ROOT / "aar_kernels", tmp_path / "aar_kernels", ignore=ignored)
    native = [*(ROOT / "csrc").rglob("*.h"), ROOT / "csrc/cpu/isa.cpp", ROOT / "csrc/bindings/torch_library.cpp"]
    for path in [*native, ROOT / "tests/helpers.py", ROOT / "tests/conftest.py"]:
        _put(tmp_path / path.relative_to(ROOT), path.read_text())
    for path, code in files.items():
        _put(tmp_path / path, code)

    assert "built _native_torch" in _python(tmp_path, "-m", "aar_kernels.build")
    said = _python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/rms")
    assert re.search(r"^29 passed", said, re.MULTILINE), said
    check = (
        "from argparse import Namespace; from aar_kernels.bench import rms;"
        "cases = list(rms.cases(Namespace(shapes='small', sweep=None, batch=[1, 2])));"
        "print([(case.shape, case.check()) for case in cases])"
    )
    names = [(f"batch {batch}, length 50, channels 128", "") for batch in (1, 2)]
    assert _python(tmp_path, "-c", check, AAR_KERNELS_ISA="portable").strip() == str(names)


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _python(directory: Path, *arguments: str, **environment: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page):
    made = {block.path for block in blocks(page)}
    text = FENCE.sub("", page.read_text())
    for path in re.findall(r"`((?:aar_kernels|aar|csrc|tests|benchmarks|configs|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or any(str(name).startswith(path) for name in made), path


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text()
    assert all(f"({page.name})" in index for page in DOCS.glob("*.md") if page.name != "README.md")
    assert "(docs/README.md)" in README.read_text()
