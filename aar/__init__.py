"""Scale-level audio tokenizer and acoustic autoregression (arXiv 2408.09027), on the operators of `aar_kernels`."""

from .models import SAT, SATConfig

__all__ = ["SAT", "SATConfig"]
