"""What AAR is compared with: the same transformer in plain PyTorch, and as a next-token model."""

from .next_token import Fused, Graphed, NextToken, Plain
from .plain_aar import PlainAAR

__all__ = ["Fused", "Graphed", "NextToken", "Plain", "PlainAAR"]
