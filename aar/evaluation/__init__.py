"""How good reconstructions are, how codebooks are used, and how well codes are predicted."""

from .codes import CodeCounts, token_nll
from .metrics import ReconstructionMetrics, si_sdr

__all__ = ["CodeCounts", "ReconstructionMetrics", "si_sdr", "token_nll"]
