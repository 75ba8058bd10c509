"""The operators as ``torch.nn`` modules."""

from .quantization.module import MultiScaleResidualQuantizer

__all__ = ["MultiScaleResidualQuantizer"]
