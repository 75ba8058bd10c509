"""A chunk of a signal through layers, for backends that know how to take a whole one through a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activate
from .layers import IDENTITY, NONE, RESIDUAL, TRANSPOSED, Fields

# What runs it, x[B, T, in] and how it is padded -> [B, T', out]; alpha[in] of a Snake of its input, or None.
Layer = tuple[Fields, Callable[[Tensor, Fields], Tensor], Tensor | None]


def stack_chunk(x: Tensor, layers: list[Layer], state: Tensor, position: int, last: bool) -> Tensor:
    """``x[B, T, in]``, which begins at step ``position`` -> ``[B, T', out]``; with ``last`` it ends the signal.

    ``state[B, ...]`` holds, of each layer in turn, ``[kept, in]``: the last steps of its input, as its product reads
    them. At position 0 nothing is read from it.
    """
    kept = state.split([fields.kept * fields.inputs for fields, *_ in layers], 1)
    for (fields, layer, alpha), before in zip(layers, kept, strict=True):
        before = before.unflatten(1, (fields.kept, fields.inputs))
        if fields.kind != RESIDUAL:
            x, fields = activate(x.mT, fields.activation, alpha).mT, fields._replace(activation=IDENTITY)
        seen, steps = x if position == 0 else torch.cat([before, x], 1), x.shape[1]
        if not last:
            before.copy_(F.pad(seen, (0, 0, fields.kept - seen.shape[1], 0)))
        if position > 0:
            if last and fields.kind != TRANSPOSED:  # what the last stride lacks
                mode = "reflect" if fields.reflect else "constant"
                seen = F.pad(seen.mT, (0, -steps % fields.stride), mode=mode).mT
            seen, fields = seen[:, fields.kept - fields.context :], fields._replace(padding=NONE)
        x = layer(seen, fields)
    return x
