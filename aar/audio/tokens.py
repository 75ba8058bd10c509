r"""The token file: the codes of one recording and what it takes to decode them, in about 570 bytes a second.

Layout, integers little-endian:

    offset  size
    0       8     magic 89 41 41 52 0D 0A 1A 0A (as in PNG: a transfer in text mode damages it visibly)
    8       2     version, 1
    10      4     H, length of the header
    14      H     header: UTF-8 JSON with `lengths`, `codebook_size`, `windows`, `sample_rate`, `num_samples`,
                  `overlap` (seconds that neighbouring windows share), `model` (SAT.fingerprint)
    14+H    P     codes, window by window, each as ceil(log2(codebook_size)) bits, most significant first;
                  the last byte is filled with zeros
    14+H+P  4     CRC-32 (zlib) of everything before
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..atomic import replacing
from ..errors import TokenFileError

__all__ = ["TOKEN_SUFFIX", "Tokens", "is_token_file", "load_tokens", "save_tokens"]

TOKEN_SUFFIX = ".aart"

_MAGIC = b"\x89AAR\r\n\x1a\n"
_VERSION = 1
_PREFIX = struct.Struct("<8sHI")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The codes of one recording.

    Attributes:
        codes: [windows, total] int64, each below `codebook_size`; total is the sum of `lengths`.
        lengths: tokens of each scale.
        codebook_size: codes per codebook.
        sample_rate: of the recording that the codes decode to, in Hz.
        num_samples: of that recording.
        overlap: seconds that neighbouring windows share.
        model: fingerprint of the model that made the codes.

    Raises:
        TokenFileError: the above do not fit together.
    """

    codes: Tensor
    lengths: tuple[int, ...]
    codebook_size: int
    sample_rate: int
    num_samples: int
    overlap: float
    model: str

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        counts = (*self.lengths, self.codebook_size, self.sample_rate, self.num_samples)
        if not self.lengths or not all(type(n) is int and n >= 1 for n in counts):
            raise TokenFileError(f"tokens with impossible sizes: {counts}")
        if not math.isfinite(self.overlap) or self.overlap < 0:
            raise TokenFileError(f"tokens with an impossible overlap: {self.overlap}")
        if self.codes.dim() != 2 or self.codes.shape[1] != sum(self.lengths) or not len(self.codes):
            raise TokenFileError(
                f"codes must be [windows, {sum(self.lengths)}], got {list(self.codes.shape)}"
            )
        if self.codes.min() < 0 or self.codes.max() >= self.codebook_size:
            raise TokenFileError(f"codes outside 0..{self.codebook_size - 1}")


def save_tokens(path: str | os.PathLike, tokens: Tokens) -> None:
    """Writes a token file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    header = {
        "lengths": list(tokens.lengths),
        "codebook_size": tokens.codebook_size,
        "windows": len(tokens.codes),
        "sample_rate": tokens.sample_rate,
        "num_samples": tokens.num_samples,
        "overlap": tokens.overlap,
        "model": tokens.model,
    }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    body = _PREFIX.pack(_MAGIC, _VERSION, len(encoded)) + encoded + _pack(tokens.codes, tokens.codebook_size)
    with replacing(path) as beside:
        beside.write_bytes(body + _CHECKSUM.pack(zlib.crc32(body)))


def load_tokens(path: str | os.PathLike) -> Tokens:
    """Reads a token file.

    Raises:
        TokenFileError: not a token file, another version, truncated, or corrupt in any bit.
        OSError: the file does not exist or may not be read.
    """
    content = Path(path).read_bytes()
    if not content.startswith(_MAGIC):
        raise TokenFileError(f"{path}: not a token file; `aar encode` makes one")
    if len(content) < _PREFIX.size + _CHECKSUM.size:
        raise TokenFileError(f"{path}: the token file is truncated; encode the recording again")
    _, version, header_size = _PREFIX.unpack_from(content)
    if version != _VERSION:
        raise TokenFileError(
            f"{path}: token file version {version}, but this program reads version {_VERSION}"
        )
    body, checksum = content[: -_CHECKSUM.size], content[-_CHECKSUM.size :]
    if _CHECKSUM.pack(zlib.crc32(body)) != checksum:
        raise TokenFileError(f"{path}: the token file is truncated or corrupt; encode the recording again")
    payload = body[_PREFIX.size + header_size :]
    try:
        header = json.loads(body[_PREFIX.size : _PREFIX.size + header_size])
        windows = header.pop("windows")
        codes = _unpack(payload, windows, sum(header["lengths"]), header["codebook_size"])
        return Tokens(codes, **header)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # The checksum is right, so this was written so: by something other than `save_tokens`.
        raise TokenFileError(f"{path}: the token file is malformed: {error}") from None


def is_token_file(path: str | os.PathLike) -> bool:
    """Whether the file begins as a token file does."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _bits(codebook_size: int) -> int:
    return (codebook_size - 1).bit_length()


def _pack(codes: Tensor, codebook_size: int) -> bytes:
    places = np.arange(_bits(codebook_size) - 1, -1, -1)
    flat = codes.flatten().cpu().numpy()
    return np.packbits((flat[:, None] >> places & 1).astype(np.uint8)).tobytes()


def _unpack(payload: bytes, windows: int, total: int, codebook_size: int) -> Tensor:
    bits = _bits(codebook_size)
    if len(payload) != (windows * total * bits + 7) // 8:
        raise ValueError(f"{len(payload)} bytes for {windows} x {total} codes of {bits} bits")
    digits = np.unpackbits(np.frombuffer(payload, np.uint8), count=windows * total * bits)
    weights = 1 << np.arange(bits - 1, -1, -1)
    return torch.from_numpy(digits.reshape(windows, total, bits) @ weights)
