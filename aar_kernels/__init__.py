"""Fused operators for next-scale audio modelling, as drop-in PyTorch operators."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Imported when first asked for, so that `aar_kernels.numpy` works without torch.
_HOMES = {
    "BackendError": "dispatch",
    "GridSchedule": "schedule",
    "ScaleCache": "attention",
    "ScaleSchedule": "schedule",
    "accelerate": "codecs",
    "attention": None,
    "codecs": None,
    "linear": None,
    "modulation": None,
    "nn": None,
    "quantization": None,
    "restore": "codecs",
    "sampling": None,
    "scale_attention": "attention",
    "scale_attention_step": "attention",
    "seanet": None,
    "transformer": None,
    "use_backend": "dispatch",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    value = importlib.import_module(f".{home or name}", __name__)
    return value if home is None else getattr(value, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
