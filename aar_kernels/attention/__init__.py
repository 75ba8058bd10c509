"""Block-causal scale attention, and its cached step.

The trail of the operator: `reference` (the mathematics), `api` (public functions), `cache` (keys and values while
sampling), `ops` (schemas and autograd), `native`, `triton` and `flash` (backends).
"""

from .api import scale_attention, scale_attention_step
from .cache import ScaleCache

__all__ = ["ScaleCache", "scale_attention", "scale_attention_step"]
