"""The library of operators as it was built here, and what happens where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from aar_kernels import _library


@pytest.fixture(scope="module")
def library():
    if not _library.library.available:
        pytest.skip(_library.library.reason)
    if shutil.which("nm") is None:
        pytest.skip("needs binutils")
    return _library.library.path


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_is_bound_to_no_python_and_to_no_cxx_interface_of_torch(library):
    names = [line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", library).splitlines()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names), "the list is not what it seems"
    foreign = [name for name in names if name.startswith("_Z") and "@" not in name]  # not the C++ runtime's
    assert not [name for name in names if name.startswith(("Py", "_Py"))] + foreign


def test_needs_neither_libpython_nor_torch_python(library):
    headers = output_of("objdump", "-p", library)
    needed = [line.split()[1] for line in headers.splitlines() if "NEEDED" in line]
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name]


def test_wide_instructions_stay_in_the_namespaces_of_their_levels(library):
    """An inline function that the linker took from an AVX-512 object would end processes on older CPUs."""
    wide, function = set(), ""
    for line in output_of("objdump", "-d", "--no-show-raw-insn", library).splitlines():
        if line.endswith(">:"):
            function = line
        elif "%zmm" in line and "isa_avx512" not in function or "%ymm" in line and "isa_avx" not in function:
            wide.add(function)
    assert not wide


def test_operators_are_registered(library):
    import torch

    assert torch.ops.aar_native.isa_report()


def test_without_a_library_the_package_works_and_says_why(tmp_path, monkeypatch):
    record = {"left_out": {"_native_torch": "the reason that was recorded"}}
    (tmp_path / "_build_info.json").write_text(json.dumps(record))
    monkeypatch.setenv("AAR_KERNELS_LIBRARY_DIR", str(tmp_path))
    text = output_of(sys.executable, "-m", "aar_kernels.info")
    assert "the reason that was recorded" in text
    assert "python -m aar_kernels.build" in text


def test_a_damaged_library_is_a_reason(tmp_path):
    (tmp_path / _library.NAME).write_bytes(b"not a library")
    found = _library._load([tmp_path])
    assert not found.available
    assert "cannot be loaded" in found.reason
    assert "python -m aar_kernels.build" in found.reason


def test_the_cache_is_searched_after_the_package(tmp_path, monkeypatch):
    import torch

    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AAR_KERNELS_LIBRARY_DIR", raising=False)
    package, cache = _library._directories()
    assert package == _library.PACKAGE
    cache.mkdir(parents=True)
    (cache / _library.NAME).touch()
    assert _library._load([tmp_path / "a package without one", cache]).path == cache / _library.NAME
    assert loaded == [cache / _library.NAME]
    torch_version = ".".join(torch.__version__.split(".")[:2])
    assert f"torch{torch_version}-" in cache.name


def test_torch_is_not_imported_before_the_operators_are_asked_for():
    code = "import sys; from aar_kernels import _library; print('torch' in sys.modules)"
    assert output_of(sys.executable, "-c", code).strip() == "False"
