"""Fused operators for next-scale audio modelling, as drop-in PyTorch operators."""

from . import nn, quantization
from .dispatch import BackendError, use_backend
from .schedule import ScaleSchedule

__version__ = "0.1.0"
__all__ = ["BackendError", "ScaleSchedule", "nn", "quantization", "use_backend"]
