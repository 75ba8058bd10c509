"""Linear layers with prepacked weights, for inference with few rows.

The trail of the operator: `weight` (how a weight is stored), `reference` (the mathematics), `api` (public functions),
`ops` (schema), `native`, `triton` with `triton_kernels` (backends), `module` (the nn.Module).
"""

from .api import linear
from .module import PackedLinear
from .weight import PackedWeight, pack

__all__ = ["PackedLinear", "PackedWeight", "linear", "pack"]
