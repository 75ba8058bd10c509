"""The operator's schema and fake implementation. PyTorch only.

Codes have no gradient, so there is no autograd. The last argument names the backend module that runs the call; the
reference is called the same way, because its check of the logits raises, which torch.compile could not trace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch

dispatch.register(__package__, "sampling_sample")

_library = torch.library.Library("aar_kernels", "FRAGMENT")
_library.define(
    "sampling_sample(Tensor logits, Tensor? uncond, Tensor seeds, SymInt position, float guidance, float temperature, "
    "SymInt top_k, float top_p, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _run(*args) -> Tensor:
    *args, backend = args
    return dispatch.module("sampling_sample", backend).sample(*args)


_library.impl("sampling_sample", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("aar_kernels::sampling_sample", lib=_library)
def _(logits, uncond, seeds, position, guidance, temperature, top_k, top_p, backend):
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)


def sample(*args) -> Tensor:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.sampling_sample(*args)
