"""Sampling: guidance, temperature, top-k, top-p and the draw in one pass per token.

The trail of the operator: `reference` (the mathematics), `common` (what makes all backends draw the same codes), `api`
(the public function), `ops` (the schema), `native` and `triton` (backends).
"""

from .api import sample

__all__ = ["sample"]
