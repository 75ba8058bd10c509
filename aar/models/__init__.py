"""The models: SAT, the tokenizer, and AAR, the next-scale transformer."""

from .aar import AAR, AARConfig
from .sat import SAT, SATConfig

__all__ = ["AAR", "AARConfig", "SAT", "SATConfig"]
