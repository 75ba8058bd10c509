"""Fully sharded data parallelism (FSDP2): each process keeps its part of every parameter, gradient and optimizer state.

What is written is whole: a checkpoint does not show how many processes made it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["load_model", "load_optimizer", "part_of", "shard", "whole"]


def shard(
    module: nn.Module, units: Sequence[nn.Module], frozen: nn.Module, *, processes: int, device: torch.device,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Shards `module` in place over all processes. Each of `units` is gathered for its own forward and backward pass.

    Args:
        units: parts of `module`, called as modules in its forward pass; what else it holds is gathered once a batch.
        frozen: another part, which every process keeps.
        dtype: in which weights of `units` travel and are used; gradients are summed in float32. Bfloat16 is what
            autocast would round them to, which would keep a whole rounded copy of all units for the backward pass.
            (Attention's scale per head, which autocast leaves alone, is rounded too.)
    """
    mesh = init_device_mesh(device.type, (processes,))
    # Residuals stay in float32: autocast rounds what enters a product, and nothing else is to be.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Of units that return views, as those of linear layers are. Nothing here writes into what a unit returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, ignored_params=set(frozen.parameters()))


def whole(value: Any, keep: bool = True) -> Any:
    """Dicts and lists of tensors, each that is sharded gathered on the CPU; every process must call.

    Args:
        keep: whether this process wants them; else they are None.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
        return value.cpu() if keep else None
    if isinstance(value, dict):
        return {name: whole(each, keep) for name, each in value.items()}
    return [whole(each, keep) for each in value] if isinstance(value, list) else value


def load_model(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors."""
    ours = module.state_dict()
    module.load_state_dict({name: part_of(value, ours.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, which are copied. Settings, such as the weight decay, stay as they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        number: {name: part_of(value, parameters[number]).clone() for name, value in each.items()}
        for number, each in state["state"].items()
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": values})


def part_of(value: Tensor, ours: Tensor | None) -> Tensor:
    """What this process keeps of a whole tensor: as much as of `ours`, where that is sharded and of its shape."""
    if not isinstance(ours, DTensor) or value.shape != ours.shape:
        return value
    return distribute_tensor(value, ours.device_mesh, ours.placements, src_data_rank=None)
