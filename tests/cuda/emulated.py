"""The CUDA kernels of csrc on the CPU: built once by the C++ compiler (csrc/cuda/emulate.h), called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aar_kernels import build
from aar_kernels.quantization import Levels, native_cuda

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O2", "-g", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


@dataclass(frozen=True)
class Device:
    """A GPU as the launch plans see it."""

    processors: int = 132
    shared: int = 227 << 10
    cluster: int = 16  # blocks at most
    chunk: int = 80  # rows searched at once at most


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler: {command[0]}")
    return command


def compile_model(directory: Path, *flags: str) -> Path:
    library = directory / "model.so"
    sources = ["-I", str(build.SOURCES / "cuda"), str(HERE / "model.cpp")]
    command = [*compiler(), *FLAGS, *flags, *sources, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


@functools.cache
def library() -> ctypes.CDLL:
    if path := os.environ.get("AAR_CUDA_MODEL"):  # one that was built with a sanitizer
        return ctypes.CDLL(path)
    with tempfile.TemporaryDirectory() as directory:
        return ctypes.CDLL(str(compile_model(Path(directory))))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _scales(levels: Levels, tables: native_cuda.Tables) -> Tensor:
    books = [s if len(levels.codebooks) > 1 else 0 for s in range(levels.schedule.num_scales)]
    rows = zip(levels.schedule.lengths, books, tables.table_of, tables.kernel_of, strict=True)
    return torch.tensor(list(rows), dtype=torch.int32)


def _tables(levels: Levels) -> native_cuda.Tables:
    return native_cuda.tabulate(
        levels.codebooks, levels.phi_weights, levels.phi_biases, levels.schedule.lengths, levels.phi_index
    )


def plan(
    batch: int, length: int, dim: int, codes: int, taps: int, lengths: list[int], device: Device
) -> dict[str, int]:  # fmt: skip
    """`EncodePlan` of csrc/cuda/msrq.h."""
    scales = torch.tensor([[n, 0, 0, 0] for n in lengths], dtype=torch.int32)
    out = torch.zeros(8, dtype=torch.int64)
    library().model_plan(
        batch, length, dim, codes, taps, _pointer(scales), len(lengths), device.processors, device.shared,
        device.cluster, device.chunk, _pointer(out),
    )  # fmt: skip
    names = ("cluster", "group", "frames", "longest", "chunk", "clusters", "shared", "workspace")
    return dict(zip(names, out.tolist(), strict=True))


def encode(x: Tensor, levels: Levels, device: Device, mask: Tensor | None = None, seed: int = 0) -> Tensor:
    """``x[B, D, T]`` -> codes, as the kernel computes them in a plan for ``device``."""
    rows = x.mT.float().contiguous()
    batch, length, dim = rows.shape
    packed, tables = native_cuda.pack(levels.codebooks, levels.metric), _tables(levels)
    scales = _scales(levels, tables)
    out = torch.full((batch, levels.schedule.total), -7)
    mask = None if mask is None else mask.contiguous()
    library().model_encode(
        _pointer(rows), _pointer(mask), *map(_pointer, packed), _pointer(tables.rows), _pointer(tables.bias),
        _pointer(scales), len(scales), batch, length, dim, levels.codebook_size, tables.taps,
        levels.metric == "cosine", device.processors, device.shared, device.cluster, device.chunk, seed, _pointer(out),
    )  # fmt: skip
    return out


def decode(
    codes: Tensor, levels: Levels, length: int, first: int, last: int, base: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum, the sums after each scale, and those pooled: what decode, decode_scales, next_scale_inputs and step
    are made of."""
    tables = _tables(levels)
    scales, batch, dim = _scales(levels, tables), len(codes), levels.latent_dim
    codes, f_hat = codes.contiguous(), torch.full((batch, length, dim), torch.nan)
    each = torch.full((last - first, batch, length, dim), torch.nan)
    pooled = torch.full((batch, sum(levels.schedule.lengths[first + 1 : last + 1]), dim), torch.nan)
    library().model_decode(
        _pointer(codes), _pointer(base), _pointer(tables.rows), _pointer(tables.bias), _pointer(scales),
        len(scales), batch, length, dim, levels.codebook_size, tables.taps, first, last, seed, _pointer(f_hat),
        _pointer(each), _pointer(pooled),
    )  # fmt: skip
    return f_hat, each, pooled
