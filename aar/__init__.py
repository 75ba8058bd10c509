"""Next-scale audio models (arXiv 2408.09027) on the operators of `aar_kernels`: SAT, the tokenizer, and AAR, the
transformer."""

from .models import AAR, SAT, AARConfig, SATConfig

__all__ = ["AAR", "AARConfig", "SAT", "SATConfig"]
