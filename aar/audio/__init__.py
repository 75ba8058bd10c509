"""Recordings and token files on disk."""

from .files import AUDIO_SUFFIXES, read_audio, write_audio
from .tokens import TOKEN_SUFFIX, Tokens, load_tokens, save_tokens

__all__ = [
    "AUDIO_SUFFIXES",
    "TOKEN_SUFFIX",
    "Tokens",
    "load_tokens",
    "read_audio",
    "save_tokens",
    "write_audio",
]
