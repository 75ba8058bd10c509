"""Multi-scale residual quantization, and plain residual quantization as its special case.

The trail of the operator: `reference` (the mathematics), `levels` (a quantizer as data), `api` (public functions),
`ops` (schemas and autograd), `native` and `triton` (backends), `module` (the nn.Module).
"""

from .api import decode, decode_scales, encode, next_scale_inputs, quantize, step, update
from .levels import Levels, phi_sharing_index
from .module import MultiScaleResidualQuantizer

__all__ = [
    "Levels",
    "MultiScaleResidualQuantizer",
    "decode",
    "decode_scales",
    "encode",
    "next_scale_inputs",
    "phi_sharing_index",
    "quantize",
    "step",
    "update",
]
