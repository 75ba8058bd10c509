"""``aar_kernels/build.py`` on small stand-in sources: what it compiles with which flags, and how it fails."""

from __future__ import annotations

import json
import platform

import pytest

X86 = platform.machine().lower() in ("x86_64", "amd64")

SOURCES = {
    "include/aar/answer.h": "inline int answer() { return 42; }",
    "cpu/kernel.cpp": """
        #include "aar/answer.h"
        #if defined(__AVX2__)
        #error
        #endif
        int portable() { return answer(); }
    """,
    "cpu/kernel_avx2.cpp": """
        #if !defined(__AVX2__) || defined(__AVX512F__)
        #error
        #endif
    """,
    "cpu/kernel_avx512.cpp": """
        #if !defined(__AVX512VNNI__)
        #error
        #endif
    """,
    "bindings/torch.cpp": """
        int portable();
        int value = portable();
    """,
    "bindings/numpy.cpp": f"""
        #if AAR_HAVE_X86 + 0 != {int(X86)}
        #error
        #endif
        int portable();
        int value = portable();
    """,
}


@pytest.fixture
def small(build, tmp_path, monkeypatch):
    """`build` over the stand-ins."""
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    for name, text in SOURCES.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    try:
        build._find_compiler()
        build._numpy_binding()
        build._torch_binding()
    except build.LeftOut as reason:
        pytest.skip(str(reason))
    return build


@pytest.mark.parametrize("ninja", [True, False])
def test_builds_both_libraries_with_and_without_ninja(small, tmp_path, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(small, "_find_ninja", lambda: None)
    elif small._find_ninja() is None:
        pytest.skip("ninja is not installed")
    record = small.build(tmp_path / "a folder", tmp_path / "work")
    assert record["left_out"] == {}
    assert record["isa_levels"] == (["portable", "avx2", "avx512"] if X86 else ["portable"])
    for library in record["built"].values():
        assert (tmp_path / "a folder" / library).stat().st_size > 1000
    assert json.loads((tmp_path / "a folder" / "_build_info.json").read_text()) == record


def test_a_changed_header_changes_the_library_and_the_hash(small, tmp_path):
    first = small.build(tmp_path / "out", tmp_path / "work")
    library = tmp_path / "out" / "_native_torch.so"
    before = library.read_bytes()
    (small.SOURCES / "include/aar/answer.h").write_text("inline int answer() { return 43; }\n")
    second = small.build(tmp_path / "out", tmp_path / "work")
    assert library.read_bytes() != before
    assert first["source_hash"] != second["source_hash"]


@pytest.mark.parametrize("ninja", [True, False])
def test_an_error_in_one_library_leaves_the_other(small, tmp_path, monkeypatch, capfd, ninja):
    if not ninja:
        monkeypatch.setattr(small, "_find_ninja", lambda: None)
    (small.SOURCES / "bindings/torch.cpp").write_text("int broken = nonsense;\n")
    record = small.build(tmp_path / "out", tmp_path / "work")
    assert list(record["built"]) == ["_numpy"]
    assert "nonsense" in record["left_out"]["_native_torch"]
    assert "nonsense" in capfd.readouterr().err
    assert not (tmp_path / "out" / "_native_torch.so").exists()


def test_a_missing_kernel_is_found_when_linking(small, tmp_path):
    (small.SOURCES / "cpu/kernel.cpp").write_text("")
    record = small.build(tmp_path / "out", tmp_path / "work")
    assert "portable()" in record["left_out"]["_native_torch"]


def test_hidden_torch_leaves_out_the_operators_alone(small, tmp_path, monkeypatch):
    find = small._find
    monkeypatch.setattr(small, "_find", lambda package: None if package == "torch" else find(package))
    record = small.build(tmp_path / "out", tmp_path / "work")
    assert list(record["built"]) == ["_numpy"]
    assert "isolation" in record["left_out"]["_native_torch"]


def test_old_torch_is_refused(small, monkeypatch):
    monkeypatch.setattr(small, "_torch_version", lambda: "2.9.1+cu128")
    with pytest.raises(small.LeftOut, match=r"2\.9\.1.* 2\.10 or later"):
        small._torch_binding()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/bin/false"}, "/bin/false"),
        ({"CXX": "/nonexistent/g++"}, "does not start"),
        ({"CXX": "", "PATH": "/nonexistent"}, "no C\\+\\+ compiler was found"),
    ],
)
def test_no_compiler_is_a_reason(build, monkeypatch, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(build.LeftOut, match=reason):
        build._find_compiler()


def test_inline_functions_come_from_the_portable_objects(small, tmp_path):
    """The linker keeps the first copy that it meets, and an AVX-512 copy would end older processors."""
    link = small._steps("_native_torch", tmp_path, ["c++"])[-1]
    names = [path.stem for path in link.inputs]
    expected = ["bindings_torch", "cpu_kernel"] + (["cpu_kernel_avx2", "cpu_kernel_avx512"] if X86 else [])
    assert names == expected


@pytest.mark.parametrize(("wanted", "gigabytes", "jobs"), [(8, 64, 8), (8, 3, 3), (1, 64, 1), (4, 0.5, 1)])
def test_memory_bounds_the_number_of_compilers(build, monkeypatch, wanted, gigabytes, jobs):
    monkeypatch.setenv("MAX_JOBS", str(wanted))
    machine = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(gigabytes * 2**18)}
    monkeypatch.setattr(build.os, "sysconf", machine.get)
    monkeypatch.setattr(build, "CGROUP_LIMIT", build.Path("/nonexistent"))
    assert build._jobs() == jobs


def test_what_cuda_lacks_leaves_the_rest(small, tmp_path, monkeypatch):
    """A torch with CUDA and no compiler for it, or one of another version: the other libraries are built."""
    monkeypatch.setattr(small, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(small.shutil, "which", lambda name, which=small.shutil.which, **options: (
        which(name, path=str(tmp_path / "cuda/bin")) if name == "nvcc" else which(name, **options)
    ))  # fmt: skip
    record = small.build(tmp_path / "out", tmp_path / "objects")
    assert set(record["built"]) == {"_native_torch", "_numpy"}
    assert "no nvcc" in record["left_out"]["_native_cuda"]

    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho release 9.2\n")
    nvcc.chmod(0o755)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("cuda: Optional[str] = '13.0'\n")
    find = small._find
    monkeypatch.setattr(small, "_find", lambda name: tmp_path / "torch" if name == "torch" else find(name))
    with pytest.raises(small.LeftOut, match="CUDA 13, but .* is of 9"):
        small._find_nvcc()


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        ("", ["sm_80", "compute_80", "sm_90a"]),
        ("8.6 9.0+PTX", ["sm_86", "sm_90", "compute_90"]),
        ("10.0a;", ["sm_100a"]),
        ("Hopper", None),
    ],
)
def test_architectures(build, monkeypatch, wanted, flags):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    if flags is None:
        with pytest.raises(build.LeftOut, match="'Hopper' is no architecture"):
            build._gencode()
    else:
        assert [flag.rpartition("=")[2] for flag in build._gencode()] == flags
