"""The native ``library`` of operators: where it lies, or why there is none. Asking never fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NAME = "_native_torch.so"
CUDA_NAME = "_native_cuda.so"
RECORD = "_build_info.json"


@dataclass(frozen=True)
class Library:
    """``torch.ops.aar_native``, if it is there."""

    path: Path | None
    reason: str | None
    cuda_reason: str | None = "there is no native library at all"  # why it has no operators for CUDA

    @property
    def available(self) -> bool:
        return self.reason is None


def record(directory: Path = PACKAGE) -> dict:
    """What the build in ``directory`` noted about itself; empty where nothing was ever built."""
    try:
        return json.loads((directory / RECORD).read_text())
    except (OSError, ValueError):
        return {}


def cache_directory() -> Path:
    """Where a build goes if the package is read-only; each source, torch and architecture has its own."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        torch = ".".join(importlib.metadata.version("torch").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    return Path(root) / "aar-kernels" / f"{record().get('source_hash')}-torch{torch}-{platform.machine()}"


def _directories() -> list[Path]:
    """Where to look. ``AAR_KERNELS_LIBRARY_DIR`` is for tests of another build: there is no fallback."""
    if chosen := os.environ.get("AAR_KERNELS_LIBRARY_DIR"):
        return [Path(chosen)]
    try:
        return [PACKAGE, cache_directory()]
    except RuntimeError:  # no home directory
        return [PACKAGE]


def _load(directories: list[Path]) -> Library:
    failures = []
    for path in (directory / NAME for directory in directories):
        if path.is_file():
            try:
                import torch

                torch.ops.load_library(path)
                return Library(path, None, _load_cuda(path.parent))
            except Exception as error:
                failures.append(f"{path} cannot be loaded: {error}")
    left_out = record(directories[0]).get("left_out", {}).get("_native_torch")
    reason = "; ".join(failures) or left_out or "it was never built"
    return Library(None, f"no native library: {reason}. To build it: python -m aar_kernels.build")


def _load_cuda(directory: Path) -> str | None:
    """Load the operators for CUDA that were built beside those for the CPU; why there are none, or None."""
    import torch

    if torch.version.cuda is None:
        return "this torch has no CUDA"
    reason = record(directory).get("left_out", {}).get("_native_cuda", "it was never built")
    if (directory / CUDA_NAME).is_file():
        try:
            torch.ops.load_library(directory / CUDA_NAME)
            return None
        except Exception as error:
            reason = f"{directory / CUDA_NAME} cannot be loaded: {error}"
    return f"no native CUDA library: {reason}. To build it: python -m aar_kernels.build"


directories = _directories()
# So that `aar_kernels._numpy` is imported from there like any other module of the package.
_path = sys.modules[__package__].__path__
_path[:] = dict.fromkeys([str(path) for path in directories if path.is_dir()] + list(_path))


def __getattr__(name: str) -> Library:
    # `library` is loaded when first asked for: torch takes seconds, and the NumPy functions do without it.
    if name != "library":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()["library"] = _load(directories)
    return found
