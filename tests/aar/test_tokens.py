import json
import struct
import zlib
from dataclasses import fields, replace

import pytest
import torch
from small import files_under

from aar.audio import Tokens, load_tokens, save_tokens
from aar.errors import TokenFileError


def tokens(windows: int = 2, lengths=(1, 2, 5), codebook_size: int = 20) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(codebook_size, (windows, sum(lengths)), generator=generator)
    return Tokens(codes, lengths, codebook_size, 24000, 30000, 0.05, "0123456789abcdef")


@pytest.mark.parametrize("codebook_size", [1, 2, 3, 16, 17, 1000, 1024, 1025, 65536])
@pytest.mark.parametrize("windows", [1, 3])
def test_round_trip(tmp_path, windows, codebook_size):
    path, original = tmp_path / "new" / "a.aart", tokens(windows, codebook_size=codebook_size)
    original.codes[-1, -1] = codebook_size - 1
    save_tokens(path, original)
    loaded = load_tokens(path)
    assert torch.equal(loaded.codes, original.codes)
    assert loaded.codes.dtype == torch.int64
    for field in fields(Tokens)[1:]:
        assert getattr(loaded, field.name) == getattr(original, field.name)
    assert files_under(tmp_path) == ["new/a.aart"]


def test_layout_is_the_documented_one(tmp_path):
    """Reads the file by the table in the module's docstring, and by nothing of the module."""
    original = tokens()
    save_tokens(tmp_path / "a", original)
    content = (tmp_path / "a").read_bytes()
    magic, version, header_size = struct.unpack_from("<8sHI", content)
    assert (magic, version) == (b"\x89AAR\r\n\x1a\n", 1)
    header = json.loads(content[14 : 14 + header_size])
    assert header["windows"] == 2
    assert header["lengths"] == [1, 2, 5]
    assert header["overlap"] == 0.05
    payload = content[14 + header_size : -4]
    assert len(payload) == 10  # 2 windows x 8 codes x 5 bits
    digits = "".join(f"{byte:08b}" for byte in payload)
    assert [int(digits[i : i + 5], 2) for i in range(0, 80, 5)] == original.codes.flatten().tolist()
    assert struct.unpack("<I", content[-4:])[0] == zlib.crc32(content[:-4])


def test_every_truncation_is_detected(tmp_path):
    path = tmp_path / "a.aart"
    save_tokens(path, tokens())
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(TokenFileError, match="not a token file|truncated"):
            load_tokens(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(TokenFileError):
        load_tokens(path)


def test_every_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "a.aart"
    save_tokens(path, tokens())
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(TokenFileError):
            load_tokens(path)


def test_another_version_is_named(tmp_path):
    path = tmp_path / "a.aart"
    save_tokens(path, tokens())
    content = bytearray(path.read_bytes())
    content[8] = 2
    path.write_bytes(content)
    with pytest.raises(TokenFileError, match="version 2, .* reads version 1"):
        load_tokens(path)


@pytest.mark.parametrize(
    "change",
    [
        {"windows": 3},
        {"windows": -1},
        {"windows": 10**15},
        {"windows": "2"},
        {"lengths": []},
        {"lengths": "abc"},
        {"lengths": [8, 0]},
        {"lengths": 8},
        {"codebook_size": 0},
        {"codebook_size": 17},
        {"codebook_size": None},
        {"num_samples": 0},
        {"num_samples": 1.5},
        {"overlap": -1},
        {"overlap": float("nan")},
        {"overlap": "none"},
        {"colour": 1},
        [],
        None,
    ],
)
def test_a_wrong_header_with_a_right_checksum(tmp_path, change):
    path, original = tmp_path / "a.aart", tokens()
    original.codes[0, 0] = 19
    save_tokens(path, original)
    content = path.read_bytes()
    size = struct.unpack_from("<I", content, 10)[0]
    header = json.loads(content[14 : 14 + size])
    header = json.dumps(header | change if isinstance(change, dict) else change).encode()
    body = content[:10] + struct.pack("<I", len(header)) + header + content[14 + size : -4]
    path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    with pytest.raises(TokenFileError, match="malformed"):
        load_tokens(path)


def test_tokens_that_do_not_fit_together():
    good = tokens()
    for change in (
        {"codes": good.codes[0]},
        {"codes": good.codes - 1},
        {"codebook_size": 5},
        {"lengths": (1, 2)},
    ):
        with pytest.raises(TokenFileError):
            replace(good, **change)
