"""Build the native code: ``python -m aar_kernels.build``, and the same from ``setup.py``.

Two libraries come out of one set of kernels. ``_native_torch`` holds the operators: it is written against the LibTorch
stable ABI, so that one build serves every later torch and every Python. ``_numpy`` is a pybind11 module: the kernels
over NumPy buffers. What was built, and why the rest was not, is kept beside them in ``_build_info.json``.

``setup.py`` loads this file by its path, where neither torch nor the package can be imported: standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
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
SOURCES = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"  # installed, or a checkout
RECORD = "_build_info.json"
COMMAND = "python -m aar_kernels.build"
TARGETS = {
    "_native_torch": "_native_torch.so",
    "_numpy": "_numpy" + sysconfig.get_config_var("EXT_SUFFIX"),
}

# Never -march=native: the library must run on any machine of this architecture, and cpuid picks a level at run time.
# Contraction is off so that all levels and compilers round alike; the kernels ask for fused multiply-add by name.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
FLAGS += ["-pthread", "-Wall", "-Wextra"]
RELEASE = ["-O3", "-DNDEBUG"]

# Instruction set of a source by the end of its name, "portable" where it names none. The order matters: see `_steps`.
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma"]
    + ["-mprefer-vector-width=512"],
}

MIN_TORCH = (2, 10)  # the first release whose stable ABI has all that the bindings use
BYTES_PER_JOB = 1 << 30


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
        steps, goals = [], []
        for target in TARGETS:
            try:
                steps += _steps(target, work, [*compiler, *FLAGS, *mode])
                goals.append(target)
            except LeftOut as reason:
                record["left_out"][target] = str(reason)
        steps = list({step.output: step for step in steps}.values())  # the targets share the kernels' objects
        for target in goals:
            log = _run(steps, work / TARGETS[target], work)
            if log is None:
                _replace(work / TARGETS[target], output / TARGETS[target])
                record["built"][target] = TARGETS[target]
            else:
                print(log, file=sys.stderr)
                record["left_out"][target] = f"compiling it failed: {_first_error(log)}"
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


def source_hash() -> str:
    """Names one state of the sources and of this file, which holds the flags."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cpp")):
        digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def explain(record: dict) -> str:
    """The record for people."""
    lines = [f"aar-kernels: built {target}" for target in record["built"]]
    lines += [f"aar-kernels: left out {target}: {reason}" for target, reason in record["left_out"].items()]
    if record["left_out"]:
        lines.append(f"aar-kernels: slower backends replace the operators; to build what is missing: {COMMAND}")
    return "\n".join(lines)


def is_forced() -> bool:
    """Whether anything left out is an error."""
    return os.environ.get("AAR_FORCE_BUILD") == "1"


# ------------------------------------------------------------------------------------------------ what to compile


def _kernels() -> list[Path]:
    levels = list(ISA_FLAGS)
    sources = sorted((SOURCES / "cpu").glob("*.cpp"), key=lambda source: (levels.index(_isa(source)), source.name))
    return [source for source in sources if _is_x86() or _isa(source) == "portable"]


def _isa(source: Path) -> str:
    suffix = source.stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else "portable"


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _steps(target: str, work: Path, compiler: list[str]) -> list[Step]:
    """The compiler runs that make one target, its kernels' objects included."""
    compiler = [*compiler, "-I", str(SOURCES / "include"), *(["-DAAR_HAVE_X86=1"] if _is_x86() else [])]
    binding, link = _torch_binding() if target == "_native_torch" else _numpy_binding()
    name = target.rpartition("_")[2]
    steps = [_compile(SOURCES / "bindings" / f"{name}.cpp", work, [*compiler, *binding])]
    steps += [_compile(source, work, [*compiler, *ISA_FLAGS[_isa(source)]]) for source in _kernels()]
    # An inline function of a header is compiled into many objects and the linker keeps the first it meets. The
    # bindings and portable kernels come first, so that no AVX-512 copy of, say, std::vector runs on an older processor.
    objects = [step.output for step in steps]
    library = work / TARGETS[target]
    command = [*compiler, "-shared", *map(str, objects), *link, "-o", str(library)]
    return [*steps, Step(library, objects, command)]


def _compile(source: Path, work: Path, command: list[str]) -> Step:
    output = work / f"{source.parent.name}_{source.stem}.o"
    dependencies = ["-MD", "-MF", f"{output}.d"]
    return Step(output, [source], [*command, *dependencies, "-c", str(source), "-o", str(output)])


def _torch_binding() -> tuple[list[str], list[str]]:
    """Flags to compile and to link ``_native_torch``. torch is found, not imported: that would take seconds."""
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
    includes = [root / "include" for root in map(_find, ("pybind11", "torch")) if root]  # torch carries a copy
    pybind11 = next((path for path in includes if (path / "pybind11/numpy.h").is_file()), None)
    if pybind11 is None:
        raise LeftOut("pybind11 is not installed (pip install pybind11)")
    return ["-isystem", str(pybind11), "-isystem", str(python)], []


def _find(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------ running it


def _find_compiler() -> tuple[list[str], str]:
    """The compiler's command (``CXX`` may carry arguments, such as ``ccache g++``) and its version."""
    if sys.platform != "linux":
        raise LeftOut(f"the native code is built on Linux only so far, this is {sys.platform}")
    chosen = shlex.split(os.environ.get("CXX", ""))
    command = chosen or [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not command:
        raise LeftOut("no C++ compiler was found (Debian, Ubuntu: sudo apt install g++; or set CXX)")
    levels = ISA_FLAGS.values() if _is_x86() else []
    probe = [*command, *FLAGS, *(flag for flags in levels for flag in flags), "-fsyntax-only", "-x", "c++", "-"]
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
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")


def _jobs() -> int:
    """Compilers at once: one that runs out of memory takes the machine with it, so memory bounds MAX_JOBS too."""
    wanted = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container may use of it
    if limit.is_file() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return max(1, min(wanted, memory // BYTES_PER_JOB))


def _run(steps: list[Step], goal: Path, work: Path) -> str | None:
    """Bring ``goal`` up to date; the compiler's output if that fails."""
    ninja = _find_ninja()
    if ninja is None:
        return _run_without_ninja(steps, goal)
    (work / "build.ninja").write_text(_ninja_file(steps))
    command = [ninja, "-C", str(work), "-j", str(_jobs()), str(goal)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode else None


def _find_ninja() -> str | None:
    """Also beside this interpreter: a virtual environment is often used without being activated."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which("ninja", path=places)


def _ninja_file(steps: list[Step]) -> str:
    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule compile", "  command = $run", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $run"]
    for step in steps:
        rule = "compile" if step.output.suffix == ".o" else "link"
        lines.append(f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}")
        lines.append("  run = " + shlex.join(step.command).replace("$", "$$"))
    return "\n".join(lines) + "\n"


def _run_without_ninja(steps: list[Step], goal: Path) -> str | None:
    def run(step: Step) -> subprocess.CompletedProcess:
        return subprocess.run(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    link = next(step for step in steps if step.output == goal)
    with ThreadPoolExecutor(_jobs()) as pool:
        results = list(pool.map(run, [step for step in steps if step.output in link.inputs]))
    failed = [done.stdout for done in results if done.returncode]
    if not failed:
        done = run(link)
        failed = [done.stdout] if done.returncode else []
    return "\n".join(failed) or None


def _replace(built: Path, destination: Path) -> None:
    """Copy beside and rename: a process that has the old library mapped keeps it whole."""
    with tempfile.NamedTemporaryFile(dir=destination.parent, delete=False) as beside:
        beside.write(built.read_bytes())
    os.chmod(beside.name, 0o755)
    os.replace(beside.name, destination)


# ------------------------------------------------------------------------------------------------- the command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Build the native code against the installed torch.")
    parser.add_argument("--output", type=Path, help="directory for the libraries (default: the package, or a cache)")
    parser.add_argument("--sanitize", metavar="LIST", help="such as address,undefined; needs --output")
    options = parser.parse_args(arguments)
    if options.sanitize and not options.output:
        parser.error("--sanitize needs --output: a sanitized library does not belong into the package")

    output = options.output or _default_output()
    checkout = SOURCES.parent != PACKAGE
    with tempfile.TemporaryDirectory() as temporary:
        work = PACKAGE.parent / "build" / f"native-{options.sanitize or 'release'}" if checkout else Path(temporary)
        record = build(output, work, options.sanitize)
    print(f"{explain(record)}\naar-kernels: in {output}")
    return 1 if "_native_torch" in record["left_out"] or (record["left_out"] and is_forced()) else 0


def _default_output() -> Path:
    if os.access(PACKAGE, os.W_OK):
        return PACKAGE
    from aar_kernels import _library  # here, since setup.py has no package to import from

    return _library.cache_directory()


if __name__ == "__main__":
    sys.exit(main())
