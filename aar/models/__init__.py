"""The models: SAT, the tokenizer."""

from .sat import SAT, SATConfig

__all__ = ["SAT", "SATConfig"]
