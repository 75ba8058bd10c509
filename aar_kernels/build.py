"""Build the native code: ``python -m aar_kernels.build``, and the same from ``setup.py``.

Two libraries come out of one set of kernels. ``_native_torch`` holds the operators: it is written against the
LibTorch stable ABI, so that one build serves every later torch and every Python. ``_numpy`` is a pybind11
module: the kernels over NumPy buffers. Where torch has CUDA a third one joins them, ``_native_cuda``, by nvcc: more
operators for the same namespace, apart so that a failure there leaves those of the CPU. What was built, and why
the rest was not, is in ``_build_info.json``.

``setup.py`` loads this file by its path where neither torch nor the package can be imported: so it needs
nothing but the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
IS_INSTALLED = (PACKAGE / "csrc").is_dir()  # in a checkout the sources lie beside the package
SOURCES = (PACKAGE if IS_INSTALLED else PACKAGE.parent) / "csrc"
RECORD = "_build_info.json"
COMMAND = "python -m aar_kernels.build"
TARGETS = {
    "_native_torch": "_native_torch.so",
    "_numpy": "_numpy" + sysconfig.get_config_var("EXT_SUFFIX"),
}

CUDA_LIBRARY = "_native_cuda.so"  # a target where torch has CUDA

# Never -march=native: the library must run on any machine of this architecture, where cpuid picks a level.
# No contraction, so that all levels and compilers round alike: kernels ask for fused multiply-add by name.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
RELEASE = ["-O3", "-DNDEBUG"]

# Instruction set of a source by the end of its name, else "portable". The order is that of linking.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
AVX512 += ["-mprefer-vector-width=512"]
ISA_FLAGS = {"portable": [], "avx2": AVX2, "avx512": AVX512}

# Unless TORCH_CUDA_ARCH_LIST says otherwise. sm_90a has clusters; PTX is for GPUs to come, which run it as it is.
CUDA_ARCHITECTURES = "8.0+PTX;9.0a"
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

MIN_TORCH = (2, 10)  # the first release whose stable ABI has all that the bindings use
BYTES_PER_JOB = 1 << 30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # what a container may use of the machine's memory


class LeftOut(Exception):
    """Why a target cannot be built on this machine."""


@dataclass(frozen=True)
class Step:
    """One run of the compiler, as ninja or we ourselves run it."""

    output: Path
    inputs: list[Path]
    command: list[str]


def build(output: Path, work: Path, sanitize: str | None = None) -> dict:
    """Build what can be built into ``output`` (object files go to ``work``) and return the record of it.

    Args:
        sanitize: the argument of ``-fsanitize``, such as ``"address,undefined"``: a slow library for tests.
    """
    output, work = Path(output).resolve(), Path(work).resolve()
    for directory in (output, work):
        directory.mkdir(parents=True, exist_ok=True)
    record = {"built": {}, "left_out": {}, "source_hash": source_hash(), "sanitize": sanitize}
    try:
        compiler, record["compiler"] = _find_compiler()
    except LeftOut as reason:
        record["left_out"] = dict.fromkeys(TARGETS, str(reason))
    else:
        mode = ["-O1", "-g", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else RELEASE
        record |= {
            "flags": FLAGS + mode,
            "isa_levels": list(dict.fromkeys(_isa(source) for source in _kernels())),
            "torch": _torch_version(),
            "python": platform.python_version(),
        }
        steps, goals, targets = [], {}, TARGETS
        if _torch_has_cuda():
            targets = TARGETS | {"_native_cuda": CUDA_LIBRARY}
            record["cuda_architectures"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
        for target, library in targets.items():
            try:
                steps += _steps(target, work, [*compiler, *FLAGS, *mode])
                goals[target] = work / library
            except LeftOut as reason:
                record["left_out"][target] = str(reason)
        failures = _make(steps, list(goals.values()), work)
        for target, library in goals.items():
            if library in failures:
                print(failures[library], file=sys.stderr)
                record["left_out"][target] = f"compiling it failed: {_first_error(failures[library])}"
            else:
                _replace(library, output / library.name)
                record["built"][target] = library.name
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


def source_hash() -> str:
    """Names one state of the sources and of this file, which holds the flags."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cpp", ".cu")):
        digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def explain(record: dict) -> str:
    """The record for people."""
    lines = [f"aar-kernels: built {target}" for target in record["built"]]
    lines += [f"aar-kernels: left out {target}: {reason}" for target, reason in record["left_out"].items()]
    if record["left_out"]:
        lines.append(f"aar-kernels: slower backends stand in. To build what is missing: {COMMAND}")
    return "\n".join(lines)


def is_forced() -> bool:
    """Whether anything left out is an error."""
    return os.environ.get("AAR_FORCE_BUILD") == "1"


# ---- what to compile ----


def _kernels() -> list[Path]:
    levels = list(ISA_FLAGS if _is_x86() else ["portable"])
    sources = sorted(source for source in (SOURCES / "cpu").glob("*.cpp") if _isa(source) in levels)
    return sorted(sources, key=lambda source: levels.index(_isa(source)))


def _isa(source: Path) -> str:
    suffix = source.stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else "portable"


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _steps(target: str, work: Path, compiler: list[str]) -> list[Step]:
    """The compiler runs that make one target, its kernels' objects included."""
    if target == "_native_cuda":
        return _cuda_steps(work, [*compiler, "-I", str(SOURCES / "include")])
    compiler = [*compiler, "-I", str(SOURCES / "include"), *(["-DAAR_HAVE_X86=1"] if _is_x86() else [])]
    binding, link = _torch_binding() if target == "_native_torch" else _numpy_binding()
    name = target.rpartition("_")[2]
    sources = sorted((SOURCES / "bindings").glob(f"{name}*.cpp"))
    steps = [_compile(source, work, [*compiler, *binding]) for source in sources]
    steps += [_compile(source, work, [*compiler, *ISA_FLAGS[_isa(source)]]) for source in _kernels()]
    # An inline function of a header is compiled into many objects, and the linker keeps the first it meets:
    # portable ones come first, so that no AVX-512 copy of, say, std::vector ends a process on an older CPU.
    objects = [step.output for step in steps]
    library = work / TARGETS[target]
    command = [*compiler, "-shared", *map(str, objects), *link, "-o", str(library)]
    return [*steps, Step(library, objects, command)]


def _compile(source: Path, work: Path, command: list[str]) -> Step:
    output = work / f"{source.parent.name}_{source.stem}.o"
    dependencies = ["-MD", "-MF", f"{output}.d"]
    return Step(output, [source], [*command, *dependencies, "-c", str(source), "-o", str(output)])


def _torch_binding() -> tuple[list[str], list[str]]:
    """Flags to compile and to link ``_native_torch``. Only find torch: importing it would take seconds."""
    root, version = _find("torch"), _torch_version()
    if root is None or version is None:
        raise LeftOut("torch is not visible to this build (pip's build isolation hides an installed one)")
    if tuple(map(int, version.split(".")[:2])) < MIN_TORCH:
        raise LeftOut(f"torch {version} is too old, {'.'.join(map(str, MIN_TORCH))} or later is needed")
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise LeftOut(f"this torch came without its C++ headers ({root / 'include'})")
    target = "0x{:02x}{:02x}{:012x}".format(*MIN_TORCH, 0)
    # No rpath: libtorch_cpu is in the process before this library is, and is found there by its name.
    return (
        ["-isystem", str(root / "include"), f"-DTORCH_TARGET_VERSION={target}"],
        ["-L", str(root / "lib"), "-ltorch_cpu", "-Wl,--no-undefined"],
    )


def _numpy_binding() -> tuple[list[str], list[str]]:
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise LeftOut(f"Python.h is not in {python} (Debian, Ubuntu: sudo apt install python3-dev)")
    # torch carries a copy, so that building after installation needs no further package.
    includes = [root / "include" for root in map(_find, ("pybind11", "torch")) if root]
    pybind11 = next((path for path in includes if (path / "pybind11/numpy.h").is_file()), None)
    if pybind11 is None:
        raise LeftOut("pybind11 is not installed (pip install pybind11)")
    return ["-isystem", str(pybind11), "-isystem", str(python)], []


def _torch_has_cuda() -> bool:
    root = _find("torch")
    return root is not None and (root / "lib/libtorch_cuda.so").is_file()


def _cuda_steps(work: Path, compiler: list[str]) -> list[Step]:
    nvcc, root = _find_nvcc()
    include, link = _torch_binding()
    bindings = sorted((SOURCES / "bindings").glob("cuda*.cpp"))
    steps = [_compile(source, work, [*compiler, *include]) for source in bindings]
    host = shlex.split(os.environ.get("CXX", ""))
    command = [nvcc, *NVCC_FLAGS, *_gencode(), *(["-ccbin", *host] if len(host) == 1 else [])]
    steps += [_compile(source, work, command) for source in sorted((SOURCES / "cuda").glob("*.cu"))]
    objects = [step.output for step in steps]
    library = work / CUDA_LIBRARY
    # The runtime goes in whole: torch brings its own under a name that changes with each version of CUDA.
    runtime = [*(f"-L{root / name}" for name in ("lib64", "lib")), "-lcudart_static", "-ldl", "-lrt"]
    command = [*compiler, "-shared", *map(str, objects), *link, "-ltorch_cuda", *runtime, "-o", str(library)]
    return [*steps, Step(library, objects, command)]


def _find_nvcc() -> tuple[str, Path]:
    """The CUDA compiler and the root of its toolkit, of the same major version as torch's CUDA."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=os.pathsep.join([str(Path(home) / "bin"), os.environ.get("PATH", os.defpath)]))
    if nvcc is None:
        raise LeftOut("torch has CUDA, but there is no nvcc (install the CUDA toolkit, or set CUDA_HOME)")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", said)
    wanted = re.search(r"^cuda\b.*?(\d+)\.", (_find("torch") / "version.py").read_text(), re.MULTILINE)
    if release is None or (wanted and release[1] != wanted[1]):
        raise LeftOut(f"torch has CUDA {wanted and wanted[1]}, but {nvcc} is of {release and release[1]}")
    return nvcc, Path(nvcc).resolve().parents[1]


def _gencode() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, such as ``8.0;9.0a+PTX``, for nvcc."""
    flags = []
    for entry in re.split(r"[; ]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES).strip("; ")):
        name, _, ptx = entry.partition("+")
        if not re.fullmatch(r"\d+\.\d[af]?", name) or ptx not in ("", "PTX"):
            raise LeftOut(f"TORCH_CUDA_ARCH_LIST: {entry!r} is no architecture such as 9.0a or 8.0+PTX")
        number = name.replace(".", "")
        # The kernels for 9.0 and 9.0a are the same, so either gets what a Hopper GPU can do.
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in ("sm", *["compute"] * bool(ptx))]
    return flags


def _find(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- compiling it ----


def _find_compiler() -> tuple[list[str], str]:
    """The compiler's command (``CXX`` may carry arguments, such as ``ccache g++``) and its version."""
    if sys.platform != "linux":
        raise LeftOut(f"the native code is built on Linux only so far, this is {sys.platform}")
    chosen = shlex.split(os.environ.get("CXX", ""))
    command = chosen or [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not command:
        raise LeftOut("no C++ compiler was found (Debian, Ubuntu: sudo apt install g++; or set CXX)")
    probe = [*command, *FLAGS, *(AVX512 if _is_x86() else []), "-fsyntax-only", "-x", "c++", "-"]
    try:
        subprocess.run(probe, input="#include <vector>\n", check=True, capture_output=True, text=True)
        version = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise LeftOut(f"the C++ compiler {shlex.join(command)!r} does not start: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        detail = _first_error(error.stderr) or f"exit status {error.returncode}"
        raise LeftOut(f"{shlex.join(command)!r} is not a C++20 compiler that works here: {detail}") from error
    return command, version.partition("\n")[0]


def _first_error(log: str) -> str:
    lines = log.strip().splitlines()
    telling = (line for line in lines if re.search(r"error:|undefined (reference|symbol)", line))
    return next(telling, lines[-1] if lines else "").strip()


def _jobs() -> int:
    """Compilers at once. Running out of memory takes the machine with it, so memory bounds MAX_JOBS too."""
    wanted = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        memory = min(memory, int(limit))
    return max(1, min(wanted, memory // BYTES_PER_JOB))


def _make(steps: list[Step], goals: list[Path], work: Path) -> dict[Path, str]:
    """Bring each goal up to date whatever becomes of the others; what was said of those that failed."""
    step_of = {step.output: step for step in steps}
    ninja = _find_ninja()
    if ninja:
        (work / "build.ninja").write_text(_ninja_file(list(step_of.values())))
        said = {goal: _call([ninja, "-C", str(work), "-j", str(_jobs()), str(goal)]) for goal in goals}
    else:
        objects = [output for output in step_of if output not in goals]
        with ThreadPoolExecutor(_jobs()) as pool:
            running = {path: pool.submit(_call, step_of[path].command) for path in objects}
        errors = {path: call.result() for path, call in running.items()}
        said = {}
        for goal in goals:
            failed = [errors[path] for path in step_of[goal].inputs if errors[path]]
            said[goal] = "\n".join(failed) or _call(step_of[goal].command)
    return {goal: text for goal, text in said.items() if text}


def _call(command: list[str]) -> str:
    """Nothing, or what the command printed if it failed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (done.stdout or f"exit status {done.returncode}") if done.returncode else ""


def _find_ninja() -> str | None:
    """Also beside this interpreter: a virtual environment is often used without being activated."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which("ninja", path=places)


def _ninja_file(steps: list[Step]) -> str:
    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule compile", "  command = $run", "  description = $in", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $run", "  description = $out"]
    for step in steps:
        rule = "compile" if step.output.suffix == ".o" else "link"
        lines.append(f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}")
        lines.append("  run = " + shlex.join(step.command).replace("$", "$$"))
    return "\n".join(lines) + "\n"


def _replace(built: Path, destination: Path) -> None:
    """Copy beside and rename: a process that has the old library mapped keeps it whole."""
    with tempfile.NamedTemporaryFile(dir=destination.parent, delete=False) as beside:
        beside.write(built.read_bytes())
    os.chmod(beside.name, 0o755)
    os.replace(beside.name, destination)


# ---- the command line ----


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Build the native code for this torch.")
    parser.add_argument("--output", type=Path, help="where to put it (default: the package, or a cache)")
    parser.add_argument("--sanitize", metavar="LIST", help="such as address,undefined; needs --output")
    options = parser.parse_args(arguments)
    if options.sanitize and not options.output:
        parser.error("--sanitize needs --output: a sanitized library does not belong into the package")

    output = options.output or _default_output()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if IS_INSTALLED else PACKAGE.parent / "build"
        record = build(output, root / f"native-{options.sanitize or 'release'}", options.sanitize)
    print(f"{explain(record)}\naar-kernels: in {output}")
    return 1 if "_native_torch" in record["left_out"] or (record["left_out"] and is_forced()) else 0


def _default_output() -> Path:
    if os.access(PACKAGE, os.W_OK):
        return PACKAGE
    from aar_kernels import _library  # here, since setup.py has no package to import from

    return _library.cache_directory()


if __name__ == "__main__":
    sys.exit(main())
