"""Multi-scale residual quantization, and plain residual quantization as its special case.

The trail of the operator: `reference` (the mathematics), `levels` (a quantizer as data), `api` (public functions),
`ops` (schemas and autograd), `native` and `triton` (backends), `module` (the nn.Module).
"""

from .api import (
    decode,
    decode_projected,
    decode_scales,
    encode,
    encode_projected,
    next_scale_inputs,
    quantize,
    step,
    update,
)
from .levels import Levels, ProjectedLevels, phi_sharing_index, residual_phi
from .module import MultiScaleResidualQuantizer

__all__ = [
    "Levels",
    "MultiScaleResidualQuantizer",
    "ProjectedLevels",
    "decode",
    "decode_projected",
    "decode_scales",
    "encode",
    "encode_projected",
    "next_scale_inputs",
    "phi_sharing_index",
    "quantize",
    "residual_phi",
    "step",
    "update",
]
