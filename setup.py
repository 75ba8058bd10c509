"""The native code and the files to install; everything else is in ``pyproject.toml``.

Installing succeeds without a compiler and without torch; ``AAR_FORCE_BUILD=1`` makes that an error.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_build():
    """By its path: importing the package would import torch, which pip's build environment does not have."""
    spec = importlib.util.spec_from_file_location("aar_kernels_build", ROOT / "aar_kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    def run(self):
        native = load_build()
        output = ROOT / "aar_kernels" if self.inplace else Path(self.build_lib) / "aar_kernels"
        # An earlier build must not stand in for one left out now.
        for library in (*native.TARGETS.values(), native.CUDA_LIBRARY):
            (output / library).unlink(missing_ok=True)
        record = native.build(output, ROOT / "build" / "native-release")
        print(native.explain(record), file=sys.stderr)
        if record["left_out"] and native.is_forced():
            raise SystemExit("aar-kernels: AAR_FORCE_BUILD=1 allows nothing to be left out")


setup(
    packages=[*find_packages(include=["aar", "aar.*", "aar_kernels", "aar_kernels.*"]), "aar_kernels.csrc"],
    # The sources are installed too: `python -m aar_kernels.build` needs them.
    package_dir={"aar_kernels.csrc": "csrc"},
    package_data={
        "aar": ["py.typed", "demo/clips/*", "weights/*/*.*", "weights/*/*/*"],
        "aar_kernels": ["py.typed"],
        "aar_kernels.csrc": ["**/*.h", "**/*.cpp", "**/*.cu"],
    },
    ext_modules=[Extension("aar_kernels._numpy", sources=[])],  # makes the wheel one of this platform
    cmdclass={"build_ext": BuildNative},
)
