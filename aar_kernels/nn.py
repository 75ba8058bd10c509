"""The operators as ``torch.nn`` modules."""

from .linear.module import PackedLinear
from .quantization.module import MultiScaleResidualQuantizer

__all__ = ["MultiScaleResidualQuantizer", "PackedLinear"]
