"""Next-scale audio models (arXiv 2408.09027) on the operators of `aar_kernels`: SAT, the tokenizer."""

from .models import SAT, SATConfig

__all__ = ["SAT", "SATConfig"]
