"""Reads the published checkpoints (arXiv 2408.09027) into this library's modules."""

from ..errors import CheckpointError
from .files import SUFFIXES
from .tokenizer import quantizer_from_published, sat_from_published
from .transformer import aar_from_published

__all__ = ["SUFFIXES", "CheckpointError", "aar_from_published", "quantizer_from_published", "sat_from_published"]
