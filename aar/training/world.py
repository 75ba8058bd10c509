"""The processes of a training, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..errors import AarError

__all__ = ["World", "joined"]


@dataclass(frozen=True)
class World:
    """This process: number `rank` of `size`, on `device`."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    size: int = 1

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module`, which averages its gradients over all processes if there are several.

        Buffers stay out: codebooks are made alike by the quantizer, which sums what it counts.
        """
        if self.size == 1:
            return module
        with warnings.catch_warnings():
            # torch 2.13 has a new name for the option, torch 2.10 does not know it.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, broadcast_buffers=False)

    def mean(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def gather(self, value: object) -> list:
        """What each process gives, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[World]:
    """The world that torchrun's environment describes, gloo on CPUs and nccl on GPUs; alone without torchrun.

    Args:
        device: "cpu" or "cuda"; None: cuda if there is one.

    Raises:
        AarError: no such device.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size, rank, local = (int(os.environ.get(name, default))
                         for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    try:
        place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise AarError(f"device {kind}: {str(error).splitlines()[0]}") from None
    if size == 1:
        yield World(place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(place, rank, size)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def without_reduction(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Gradients of `modules` stay this process's own, until a backward pass outside."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            elif isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
        yield
