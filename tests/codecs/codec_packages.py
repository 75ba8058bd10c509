"""Packages whose quantizers are tested, imported with stand-ins for what the quantizers do not need.

`encodec`, `dac` and `moshi` import packages for audio files and text that are large, or that do not load beside a CPU
build of torch; what is tested uses none of it. For the same reason they are not in the test extra, which would bring
those packages along: `make build` installs them by `pip install --no-deps encodec descript-audio-codec moshi`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from unittest import mock

import pytest
import torch

STAND_INS = {
    "encodec": ("torchaudio",),
    "dac": ("audiotools", "audiotools.ml", "argbind"),
    "moshi": ("sentencepiece", "sphn"),
    "transformers.models.higgs_audio_v2_tokenizer": ("torchaudio",),
}


class BaseModel(torch.nn.Module):
    """Of audiotools: what `dac` derives its models from."""

    INTERN: list[str] = []
    EXTERN: list[str] = []


def load(name: str):
    """Import a module of one of the packages; skips the test where the package is not installed."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        why = "; it is not in the test extra, for it requires another torch or torchaudio: pip install --no-deps"
        pytest.skip(f"{package} is not installed{why if package in STAND_INS else ''}")
    if name in sys.modules:
        return sys.modules[name]
    wanted = [other for key, others in STAND_INS.items() if f"{name}.".startswith(f"{key}.") for other in others]
    missing = [other for other in wanted if not _importable(other)]
    stand_ins = {other: _stand_in(other) for other in missing}
    if "audiotools.ml" in stand_ins:
        stand_ins["audiotools"].ml = stand_ins["audiotools.ml"]
        stand_ins["audiotools.ml"].BaseModel = BaseModel
    before = set(sys.modules)
    with mock.patch.dict(sys.modules, stand_ins):
        module = importlib.import_module(name)
        loaded = {key: value for key, value in sys.modules.items() if key not in before | set(stand_ins)}
    sys.modules.update(loaded)  # `mock.patch.dict` drops them together with the stand-ins
    return module


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # torchaudio raises OSError beside another build of torch
        return False
    return True


def _stand_in(name: str):
    module = mock.MagicMock(name=name)
    module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
    return module
