"""Which shapes and dtypes a benchmark goes through."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TypeVar

import torch

Sizes = TypeVar("Sizes")  # a frozen dataclass of integers, one of them `batch` or `rows`

SHAPES = ("paper", "small", "sweep")
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip
BATCHES = {"paper": [1, 8, 32], "small": [2], "sweep": [1, 2, 4, 8, 16]}
LATENTS = {"paper": [64, 128], "small": [16], "sweep": [32, 64, 128]}


def sweep(options: Namespace, base: Sizes, values: Mapping[str, Iterable[int]]) -> list[Sizes]:
    """``base`` with one size changed at a time, through its ``values``; of the sizes in ``options.sweep`` if given.

    The base itself, which lies on every line, comes once.
    """
    chosen = [name for name in values if options.sweep is None or name in options.sweep]
    return list(dict.fromkeys(replace(base, **{name: value}) for name in chosen for value in values[name]))


def others(sizes: Sizes, base: Sizes, named: Iterable[str] = ("batch",)) -> str:
    """``", length 150"``: what differs from the base, beyond what a shape's name says anyway."""
    usual = asdict(base)
    return "".join(
        f", {name} {value}" for name, value in asdict(sizes).items() if name not in named and value != usual[name]
    )


def dtypes(options: Namespace, usual: Iterable[torch.dtype], also: Iterable[torch.dtype] = ()) -> list[torch.dtype]:
    """Those measured by default, or those that were asked for by name, where there is a kernel for them."""
    if options.dtype is None:
        return list(usual)
    return [dtype for dtype in (*usual, *also) if dtype in [DTYPES[name] for name in options.dtype]]
