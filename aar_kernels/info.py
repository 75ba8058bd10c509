"""``python -m aar_kernels.info``: what can run on this machine and, for what cannot, why."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform

import torch

from aar_kernels import _library, build, dispatch

DISTRIBUTIONS = ("aar-kernels", "torch", "triton", "numpy", "einops", "flash-attn")


def collect() -> dict:
    """Everything that the command prints, as plain data."""
    # Operators register themselves when they are imported, and the package waits to be asked.
    for ops in _library.PACKAGE.glob("*/ops.py"):
        importlib.import_module(f"aar_kernels.{ops.parent.name}.ops")
    library = _library.library
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in DISTRIBUTIONS}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "torch threads": torch.get_num_threads(),
            "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "native": {
            "library": str(library.path) if library.available else None,
            "reason": library.reason,
            "instruction sets": _instruction_sets(),
            "numpy module": _numpy_module(),
            "build": _build_record(),
        },
        "operators": dispatch.operators(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_record() -> dict:
    """The note of the build that is in use, and whether the sources have changed since."""
    library = _library.library
    record = _library.record(library.path.parent if library.path else _library.directories[0])
    return record and record | {"stale": record.get("source_hash") != build.source_hash()}


def _instruction_sets() -> str | None:
    if not _library.library.available:
        return None
    if not hasattr(torch.ops.aar_native, "isa_report"):
        return f"unknown, the library is older than this package: {build.COMMAND}"
    return torch.ops.aar_native.isa_report().replace(";", "; ")


def _numpy_module() -> str:
    try:
        from aar_kernels import _numpy
    except ImportError as error:
        return f"no: {_library.record().get('left_out', {}).get('_numpy') or error}"
    return _numpy.__file__


def render(info: dict) -> str:
    """The same for people."""
    native, record = info["native"], info["native"]["build"]
    sections = {
        "versions": {name: version or "not installed" for name, version in info["versions"].items()},
        "machine": info["machine"] | {"cuda": ", ".join(info["machine"]["cuda"]) or "no device"},
        "native code": {
            "library": native["library"] or native["reason"],
            "instruction sets": native["instruction sets"] or "none",
            "numpy module": native["numpy module"],
        },
        "build": {
            "compiler": record.get("compiler", "none was recorded"),
            "flags": " ".join(record.get("flags", [])),
            "levels": ", ".join(record.get("isa_levels", [])),
            "torch": record.get("torch"),
            "sources": record.get("built") and _freshness(record),
            **{f"left out {target}": reason for target, reason in record.get("left_out", {}).items()},
        },
        **{
            f"operator {name}": {
                key: f"no: {reason}" if reason else "yes" for key, reason in backends.items()
            }
            for name, backends in info["operators"].items()
        },
    }
    blocks = []
    for title, entries in sections.items():
        width = max(map(len, entries))
        lines = [f"  {name:<{width}}  {value}" for name, value in entries.items() if value]
        blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks)


def _freshness(record: dict) -> str:
    return f"changed since this build: {build.COMMAND}" if record["stale"] else "as built"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aar_kernels.info", description="What can run here.")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    info = collect()
    print(json.dumps(info, indent=2) if parser.parse_args().json else render(info))


if __name__ == "__main__":
    main()
