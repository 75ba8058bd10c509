"""The fused operators inside codecs that somebody else wrote.

`accelerate` finds the residual quantizers that it knows in a model and exchanges their classes for subclasses whose
methods run on `aar_kernels.quantization`. The trail: `accelerate` (the search, the report), `adapter` (what every
adapter is), `plain` and `projected` (the two families of quantizers), and one small file for each package.
"""

from .accelerate import Entry, Report, accelerate, patch_mapping, restore

__all__ = ["Entry", "Report", "accelerate", "patch_mapping", "restore"]
