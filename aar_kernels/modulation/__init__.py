"""Adaptive layer normalisation and gated residuals, as the blocks of DiT, VAR and AAR have them.

The trail of the operator: `reference` (the mathematics), `api` (public functions), `ops` (schemas and autograd),
`native` and `triton` (backends).
"""

from .api import gated_residual_modulate, layer_norm_modulate

__all__ = ["gated_residual_modulate", "layer_norm_modulate"]
