"""The operators as ``torch.nn`` modules."""

from .linear.module import PackedLinear
from .quantization.module import MultiScaleResidualQuantizer
from .seanet.module import PackedSEANet

__all__ = ["MultiScaleResidualQuantizer", "PackedLinear", "PackedSEANet"]
