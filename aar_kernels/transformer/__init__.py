"""Blocks of a transformer with adaptive layer norm, for sampling: all their layers for the next tokens in one call.

The trail of the operator: `reference` (the mathematics), `api` (public functions), `ops` (schema), `native` (backend).
Its layers are the operators `linear`, `attention` and `modulation`, whose kernels it runs.
"""

from .api import Block, step

__all__ = ["Block", "step"]
