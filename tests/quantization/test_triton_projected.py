"""Factorised quantizers on Triton, in its interpreter, against the float64 reference. Small cases: it is slow."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import interpreter
from helpers import assert_as_accurate
from quantization.projected_cases import assert_projected_codes, projected_as, replay_projected

from aar_kernels import BackendError, dispatch
from aar_kernels.quantization import ProjectedLevels, decode_projected, encode_projected, reference


def make(
    strides, length: int, *, batch: int = 2, channels: int = 10, dim: int = 4, size: int = 20, books: int | None = None,
    metric: str = "cosine",
) -> tuple[ProjectedLevels, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(len(strides) + length)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    books = books or len(strides)
    shrink = 0.7 ** torch.arange(books)[:, None, None]
    levels = ProjectedLevels(
        draw(books, size, dim), draw(books, dim, channels) / channels**0.5, draw(books, dim) / 10,
        draw(books, channels, dim) / dim**0.5 * shrink, draw(books, channels) / 10, strides, metric,
    )  # fmt: skip
    return levels, draw(batch, channels, length)


CASES = {
    "two tiles": make((1, 1, 1), 19),
    "strides": make((4, 2, 1), 20, metric="euclidean"),
    "no power of two": make((1, 3, 1), 21, batch=1),
    "a long period": make((5, 8, 1), 40, batch=1, size=7),
    "some of the levels": make((2, 1), 18, books=4),
    "wide": make((1, 2), 6, channels=70, dim=33, size=150),
    "one channel, one code": make((1, 1), 3, channels=1, dim=1, size=1, metric="euclidean"),
    "DAC's levels": make((1, 1), 2, channels=64, dim=8, size=300, batch=1),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_encode(case):
    levels, x = case
    codes, projected = encode_projected(x, levels, backend="triton")
    assert_projected_codes(codes, levels, x)
    exact = replay_projected(codes, x, projected_as(levels, torch.float64))[0][1]
    assert_as_accurate(projected, replay_projected(codes, x, levels)[0][1], exact)


@every_case
def test_decode(case):
    levels, x = case
    length, generator = x.shape[2], torch.Generator().manual_seed(0)
    codes = torch.randint(-1, levels.codebook_size, (len(x), sum(levels.lengths(length))), generator=generator)
    decode = lambda levels, backend: decode_projected(codes, levels, length=length, backend=backend)  # noqa: E731
    double = projected_as(levels, torch.float64)
    assert_as_accurate(decode(levels, "triton"), decode(levels, "reference"), decode(double, "reference"))


def whole(case: str) -> tuple[ProjectedLevels, Tensor]:
    """In whole numbers, of which sums are exact: NumPy, which interprets a dot product, adds in no fixed order."""
    levels, x = CASES[case]
    names = ("codebooks", "weight_in", "bias_in", "weight_out", "bias_out")
    rounded = {name: (4 * getattr(levels, name)).round() for name in names}
    return dataclasses.replace(levels, **rounded, metric="euclidean"), x.round()


def test_an_item_does_not_depend_on_its_neighbours():
    """Nor does a frame on those before and after it, where no stride joins them."""
    levels, x = whole("two tiles")
    codes, projected = encode_projected(x, levels, backend="triton")
    codes = codes.unflatten(1, (3, 19))
    for b in range(len(x)):
        alone, its = encode_projected(x[b : b + 1, :, 5:12], levels, backend="triton")
        assert torch.equal(alone.unflatten(1, (3, 7))[0], codes[b, :, 5:12])
        assert torch.equal(its[0], projected[b, :, 5:12])
        decoded = decode_projected(codes.flatten(1), levels, length=19, backend="triton")
        assert torch.equal(decode_projected(alone, levels, length=7, backend="triton")[0], decoded[b, :, 5:12])


def test_nan_and_inf():
    """Every code of an item that has one is -1, and the others are as without it."""
    levels, x = CASES["strides"]
    x = torch.cat([x, x])
    expected, _ = encode_projected(x, levels, backend="triton")
    x[1, 2, 3], x[3, 0, 0] = float("nan"), float("-inf")
    codes, _ = encode_projected(x, levels, backend="triton")
    assert (codes[[1, 3]] == -1).all()
    assert torch.equal(codes[[0, 2]], expected[[0, 2]])


def test_the_first_of_equal_codes_wins():
    levels, x = whole("two tiles")
    levels = dataclasses.replace(levels, codebooks=levels.codebooks[:, torch.arange(140) % 20])
    codes, _ = encode_projected(x, levels, backend="triton")
    assert codes.max() < 20


@pytest.mark.parametrize("code", [-2, 20])
def test_codes_out_of_range(code):
    levels, x = CASES["strides"]
    codes, _ = encode_projected(x, levels, backend="triton")
    codes[1, 3] = code
    with pytest.raises(RuntimeError, match="codes must be in"):
        decode_projected(codes, levels, length=20, backend="triton")


def test_empty_batch():
    levels, x = CASES["strides"]
    codes, projected = encode_projected(x[:0], levels, backend="triton")
    assert (codes.shape, projected.shape) == ((0, 35), (0, 12, 20))
    assert decode_projected(codes, levels, length=20, backend="triton").shape == (0, 10, 20)


@pytest.mark.parametrize("name", ["codebooks", "weight_in", "bias_in", "weight_out", "bias_out"])
def test_a_changed_weight_is_never_served_stale(name):
    levels, x = make((2, 1), 4)

    def results(levels):
        codes, projected = encode_projected(x, levels, backend="triton")
        return codes, projected, decode_projected(codes, levels, length=4, backend="triton")

    before = results(levels)
    getattr(levels, name).mul_(-1.5)
    after, fresh = results(levels), results(projected_as(levels, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_other_strides_in_memory():
    levels, x = CASES["strides"]
    expected = encode_projected(x, levels, backend="triton")
    names = ("codebooks", "weight_in", "weight_out")
    strided = dataclasses.replace(levels, **{name: getattr(levels, name).mT.contiguous().mT for name in names})
    found = encode_projected(x.mT.contiguous().mT, strided, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    decoded = [decode_projected(found[0], each, length=20, backend="triton") for each in (levels, strided)]
    assert torch.equal(*decoded)


def test_autocast_changes_nothing():
    levels, x = CASES["strides"]
    expected = encode_projected(x, levels, backend="triton")
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_projected(x, levels, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_and_opcheck():
    levels, x = make((2, 1), 4, batch=1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x):
        codes, projected = encode_projected(x, levels, backend="triton")
        return codes, projected, decode_projected(codes, levels, length=4, backend="triton")

    codes, projected = encode_projected(x, levels, backend="triton")
    expected = codes, projected, decode_projected(codes, levels, length=4, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(both(x), expected, strict=True))
    for name, arguments in (
        ("encode_projected", (x, *levels.arguments(), "triton")),
        ("decode_projected", (codes, *levels.arguments(), 4, "triton")),
    ):
        torch.library.opcheck(getattr(torch.ops.aar_kernels, f"msrq_{name}").default, arguments)


def test_what_it_refuses():
    levels, x = CASES["strides"]
    with pytest.raises(BackendError, match="float32 codebooks only"):
        encode_projected(x, projected_as(levels, torch.float64), backend="triton")
    codes, weight = encode_projected(x, levels, backend="triton")[0], levels.codebooks.clone().requires_grad_()
    with pytest.raises(BackendError, match="not differentiable"):
        decode_projected(codes, dataclasses.replace(levels, codebooks=weight), length=20, backend="triton")
    assert dispatch.operators()["msrq_encode_projected"]["triton"] is None
    assert reference.unavailable() is None


interpreter.isolate(globals())
