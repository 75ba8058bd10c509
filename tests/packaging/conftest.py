from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: what a build leaves behind must not end up in the working tree."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("these tests need a checkout")
    copy = tmp_path_factory.mktemp("checkout") / "aar-kernels"
    ignored = (".*", "build", "dist", "demo_output", "tests", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))


@pytest.fixture(scope="session")
def pip_wheel(checkout):
    """Runs ``pip wheel`` on the copy and returns how it ended."""

    def run(destination: Path, **environment: str) -> subprocess.CompletedProcess:
        options = ["-v", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(destination)]
        return subprocess.run(
            [sys.executable, "-m", "pip", "wheel", *options, str(checkout)],
            env=os.environ | {"AAR_FORCE_BUILD": "0"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.fixture
def build():
    """A ``build.py`` of its own, loaded by its path as ``setup.py`` does, for a test to bend."""
    spec = importlib.util.spec_from_file_location("aar_kernels_build", ROOT / "aar_kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
