"""What every Triton backend says of where it can run. Importing it imports Triton."""

from __future__ import annotations

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # read once, as Triton does when it decorates the kernels


def unavailable() -> str | None:
    if not INTERPRETED and (torch.version.cuda is None or not torch.cuda.is_available()):
        return "no CUDA device; set TRITON_INTERPRET=1 to interpret on CPU"
    return None


def wrong_device(problem) -> str | None:
    """Why the device of a call will not do."""
    if problem.device != "cuda" and not INTERPRETED:
        return "runs on CUDA; set TRITON_INTERPRET=1 to interpret on CPU"
    return None
