"""Recordings and token files on disk."""

from .files import AUDIO_SUFFIXES, AudioInfo, audio_info, check_suffix, open_audio, read_audio, write_audio
from .tokens import TOKEN_SUFFIX, Tokens, is_token_file, load_tokens, save_tokens

__all__ = [
    "AUDIO_SUFFIXES",
    "TOKEN_SUFFIX",
    "AudioInfo",
    "Tokens",
    "audio_info",
    "check_suffix",
    "is_token_file",
    "load_tokens",
    "open_audio",
    "read_audio",
    "save_tokens",
    "write_audio",
]
