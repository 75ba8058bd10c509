"""Encode and decode codes over NumPy arrays, with no torch on the machine.

`Quantizer(lengths, codebooks, phi_weights, phi_biases, phi_index, cosine)` packs the weights and runs the native
kernels on one thread: ``encode(x[batch, T, latent]) -> codes[batch, sum(lengths)]``, ``decode(codes, length)`` back.
"""

from . import _library  # noqa: F401  (also looks in the user's cache for a build)

try:
    from ._numpy import Quantizer, isa_report
except ImportError as error:
    raise ImportError(f"{error}. To build it: python -m aar_kernels.build") from error

__all__ = ["Quantizer", "isa_report"]
