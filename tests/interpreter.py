"""Tests of Triton kernels that run in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def isolate(namespace: dict) -> None:
    """Called at the end of a test module with its ``globals()``: its tests run in a process of their own.

    Triton reads TRITON_INTERPRET when a kernel is decorated, and other tests want the same kernels compiled. So without
    the variable the module's tests are taken away, and the one that is left starts a process that has it.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for name in [name for name in namespace if name.startswith("test_")]:
        del namespace[name]
    file = namespace["__file__"]

    def test_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[1]
        result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
        print(result.stdout)
        assert result.returncode == 0, result.stderr

    namespace["test_in_the_interpreter"] = test_in_the_interpreter
