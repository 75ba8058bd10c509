"""What every Triton backend says of where it can run. Importing it imports Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
from triton.runtime.errors import InterpreterError

INTERPRETED = triton.knobs.runtime.interpret  # read once, as Triton does when it decorates the kernels

# Launch options of a kernel that checks its input by `tl.device_assert`: no launch of its own, and nothing to wait for.
ASSERTING = {"debug": True, "sanitize_overflow": False}

if INTERPRETED:
    from triton.runtime import interpreter

    # The interpreter ignores the options of a launch, and assertions unless it is told so.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(**ASSERTING)


@contextlib.contextmanager
def assertions() -> Iterator[None]:
    """A kernel's failed assertion is a RuntimeError in the interpreter too, and says what failed."""
    try:
        yield
    except InterpreterError as error:
        cause: BaseException = error
        while isinstance(cause, InterpreterError):  # one for each function that calls another
            cause = cause.__cause__
        if not isinstance(cause, AssertionError):
            raise
        raise RuntimeError(str(cause)) from error


def unavailable() -> str | None:
    if not INTERPRETED and (torch.version.cuda is None or not torch.cuda.is_available()):
        return "no CUDA device; set TRITON_INTERPRET=1 to interpret on CPU"
    return None


def wrong_device(problem) -> str | None:
    """Why the device of a call will not do."""
    if problem.device != "cuda" and not INTERPRETED:
        return "runs on CUDA; set TRITON_INTERPRET=1 to interpret on CPU"
    return None
