"""Factorised quantizers: every backend against the reference in float64."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, require
from native_levels import LEVELS, check_level, check_sanitized
from quantization.projected_cases import assert_projected_codes, make_projected, projected_as, replay_projected

from aar_kernels import BackendError
from aar_kernels.quantization import ProjectedLevels, decode_projected, encode_projected, native, ops, reference

SCRIPT = Path(__file__).parent / "projected_equality.py"
SEEDS = range(30)


@pytest.mark.parametrize("seed", SEEDS)
def test_encode_projected(backend, seed):
    levels, x = make_projected(seed)
    codes, latents = encode_projected(x, levels, backend=backend)
    assert_projected_codes(codes, levels, x)
    exact = replay_projected(codes, x, projected_as(levels, torch.float64))[0][1]
    assert_as_accurate(latents, replay_projected(codes, x, levels)[0][1], exact)


@pytest.mark.parametrize("seed", SEEDS)
def test_decode_projected(backend, seed):
    levels, x = make_projected(seed)
    length, generator = x.shape[2], torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, levels.codebook_size, (len(x), sum(levels.lengths(length))), generator=generator)
    with torch.no_grad():
        decoded = decode_projected(codes, levels, length=length, backend=backend)
        plain = reference.decode_projected(codes, *levels.arguments(), length)
        exact = reference.decode_projected(codes, *projected_as(levels, torch.float64).arguments(), length)
    assert_as_accurate(decoded, plain, exact)


def test_the_reference_is_the_algorithm():
    """Spelled out frame by frame, with plain loops."""
    levels, x = make_projected(1)
    levels, x = projected_as(levels, torch.float64), x.double()
    codes, latents = reference.encode_projected(x, *levels.arguments())
    parts = codes.split(levels.lengths(x.shape[2]), dim=1)
    dim = levels.codebooks.shape[2]
    for b in range(len(x)):
        residual = x[b].clone()
        for s, stride in enumerate(levels.strides):
            torch.testing.assert_close(
                latents[b, s * dim : (s + 1) * dim], levels.weight_in[s] @ residual + levels.bias_in[s][:, None]
            )
            for i in range(x.shape[2] // stride):
                frames = slice(i * stride, (i + 1) * stride)
                z = levels.weight_in[s] @ residual[:, frames].mean(dim=1) + levels.bias_in[s]
                book = levels.codebooks[s]
                if levels.metric == "cosine":
                    code = (F.normalize(book, dim=1) @ z).argmax()
                else:
                    code = (book - z).square().sum(dim=1).argmin()
                assert parts[s][b, i] == code
                residual[:, frames] -= (levels.weight_out[s] @ book[code] + levels.bias_out[s])[:, None]


def test_an_item_does_not_depend_on_its_neighbours(fast):
    """Nor on the number of threads, or on what lies before and after: the strides' own frames alone."""
    levels, _ = make_projected(3)
    levels = dataclasses.replace(levels, strides=[1] * len(levels.strides))
    x = torch.randn(5, levels.channels, 100, generator=torch.Generator().manual_seed(0))
    codes, latents = encode_projected(x, levels, backend=fast)
    codes = codes.unflatten(1, (-1, 100))
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        for b in range(len(x)):
            alone, its = encode_projected(x[b : b + 1, :, 17:60], levels, backend=fast)
            assert torch.equal(alone.unflatten(1, (-1, 43))[0], codes[b, :, 17:60])
            assert torch.equal(its[0], latents[b, :, 17:60])
            whole = decode_projected(codes.flatten(1), levels, length=100, backend=fast)
            part = decode_projected(alone, levels, length=43, backend=fast)
            assert torch.equal(part[0], whole[b, :, 17:60])
    torch.set_num_threads(threads)


def test_nan_and_inf(backend):
    """Every code of an item that has one is -1, and the others are as without it."""
    levels, _ = make_projected(3)
    x = torch.randn(4, levels.channels, 12, generator=torch.Generator().manual_seed(0))
    expected, _ = encode_projected(x, levels, backend=backend)
    x[1, 2, 3], x[3, 0, 0] = float("nan"), float("-inf")
    codes, _ = encode_projected(x, levels, backend=backend)
    assert (codes[[1, 3]] == -1).all()
    assert torch.equal(codes[[0, 2]], expected[[0, 2]])


def test_other_strides_in_memory(backend):
    levels, x = make_projected(0)
    codes, latents = encode_projected(x, levels, backend=backend)
    strided = dataclasses.replace(
        levels, codebooks=levels.codebooks.mT.contiguous().mT, weight_in=levels.weight_in.mT.contiguous().mT,
        weight_out=levels.weight_out.mT.contiguous().mT,
    )  # fmt: skip
    again, its = encode_projected(x.mT.contiguous().mT, strided, backend=backend)
    assert torch.equal(codes, again)
    assert torch.equal(latents, its)
    decoded = [decode_projected(codes, each, length=x.shape[2], backend=backend) for each in (levels, strided)]
    assert torch.equal(*decoded)


def test_gradients_of_decoding():
    """By the reference, which is chosen where they are asked for."""
    shapes = (2, 5, 3), (2, 3, 4), (2, 3), (2, 4, 3), (2, 4)
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    levels, x = ProjectedLevels(*weights, strides=(2, 1)), torch.randn(2, 4, 4, dtype=torch.float64)
    codes, _ = encode_projected(x, levels)

    def decode(codebooks, weight_out, bias_out):
        changed = dataclasses.replace(levels, codebooks=codebooks, weight_out=weight_out, bias_out=bias_out)
        return decode_projected(codes, changed, length=x.shape[2])

    assert torch.autograd.gradcheck(decode, (levels.codebooks, levels.weight_out, levels.bias_out))
    single = projected_as(levels, torch.float32)
    single.codebooks.requires_grad_()
    with pytest.raises(BackendError, match="not differentiable"):
        decode_projected(codes, single, length=x.shape[2], backend="native")


@pytest.mark.parametrize("seed", [0, 3])
def test_operators(fast, seed):
    levels, x = make_projected(seed)
    codes, _ = encode_projected(x, levels)
    for name, arguments in (
        ("encode_projected", (x, *levels.arguments(), fast)),
        ("decode_projected", (codes, *levels.arguments(), x.shape[2], fast)),
    ):
        torch.library.opcheck(getattr(torch.ops.aar_kernels, f"msrq_{name}").default, arguments)


def test_compiled(fast):
    levels, x = make_projected(3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x):
        codes, latents = encode_projected(x, levels, backend=fast)
        return codes, latents, decode_projected(codes, levels, length=x.shape[2], backend=fast)

    codes, latents = encode_projected(x, levels, backend=fast)
    expected = codes, latents, decode_projected(codes, levels, length=x.shape[2], backend=fast)
    assert all(torch.equal(a, b) for a, b in zip(both(x), expected, strict=True))


@pytest.mark.parametrize("name", ["codebooks", "weight_in", "bias_in", "weight_out", "bias_out"])
def test_a_changed_weight_is_never_served_stale(name):
    require("msrq_encode_projected", "native")
    levels, _ = make_projected(3)
    x = torch.randn(2, levels.channels, 24, generator=torch.Generator().manual_seed(0))

    def results(levels):
        codes, latents = encode_projected(x, levels, backend="native")
        return codes, latents, decode_projected(codes, levels, length=24, backend="native")

    before = results(levels)
    assert all(torch.equal(a, b) for a, b in zip(results(levels), before, strict=True))
    getattr(levels, name).mul_(-1.5)
    after, fresh = results(levels), results(projected_as(levels, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_more_levels_share_what_is_packed(monkeypatch):
    levels, _ = make_projected(3)
    levels = dataclasses.replace(levels, strides=[1] * len(levels.codebooks))
    x = torch.randn(2, levels.channels, 9, generator=torch.Generator().manual_seed(0))
    packed, pack = [], torch.ops.aar_native.msrq_pack
    monkeypatch.setattr(torch.ops.aar_native, "msrq_pack", lambda *args: packed.append(1) or pack(*args))
    native._packed_codebooks.clear()
    whole, _ = encode_projected(x, levels, backend="native")
    for count in range(1, len(levels.codebooks)):
        codes, _ = encode_projected(x, dataclasses.replace(levels, strides=[1] * count), backend="native")
        assert torch.equal(codes, whole[:, : 9 * count])
    assert len(packed) == 1


LEVELS_3 = make_projected(3)[0]
CHANNELS = LEVELS_3.channels


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codebooks": LEVELS_3.codebooks[0]}, "codebooks must be"),
        ({"codebooks": LEVELS_3.codebooks[:, :0]}, "codebooks must be"),
        ({"weight_in": LEVELS_3.weight_in[..., 1:]}, "projections must be"),
        ({"bias_in": LEVELS_3.bias_in[:, 1:]}, "projections must be"),
        ({"weight_out": LEVELS_3.weight_out.mT}, "projections must be"),
        ({"bias_out": LEVELS_3.bias_out[:1]}, "projections must be"),
        ({"bias_out": LEVELS_3.bias_out.double()}, "one floating dtype"),
        ({"metric": "manhattan"}, "metric"),
        ({"strides": ()}, "strides"),
        ({"strides": (1, 0)}, "strides"),
        ({"strides": (1,) * 50}, "strides"),
        ({"strides": (7,)}, "multiple of the strides"),
    ],
)
def test_levels_that_do_not_fit(backend, changed, message):
    with pytest.raises(ValueError, match=message):
        encode_projected(torch.randn(2, CHANNELS, 12), dataclasses.replace(LEVELS_3, **changed), backend=backend)


@pytest.mark.parametrize("x", [torch.ones(2, 12), torch.ones(2, CHANNELS + 1, 12), torch.ones(2, CHANNELS, 12).long()])
def test_inputs_that_do_not_fit(backend, x):
    with pytest.raises(ValueError, match="x must be"):
        encode_projected(x, LEVELS_3, backend=backend)


def test_codes_that_do_not_fit(backend):
    tokens, size = sum(LEVELS_3.lengths(12)), LEVELS_3.codebook_size
    for codes in (torch.zeros(2, tokens + 1).long(), torch.zeros(2, tokens), torch.zeros(tokens).long()):
        with pytest.raises(ValueError, match="codes must be"):
            decode_projected(codes, LEVELS_3, length=12, backend=backend)
    fifth = dataclasses.replace(LEVELS_3, strides=(5,))
    with pytest.raises(ValueError, match="multiple"):
        decode_projected(torch.zeros(2, 1).long(), fifth, length=12, backend=backend)
    for wrong in (size, -2):
        with pytest.raises(RuntimeError, match="codes must be in"):
            decode_projected(torch.full((2, tokens), wrong), LEVELS_3, length=12, backend=backend)


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    require("msrq_encode_projected", "native")
    check_level(SCRIPT, level, cases=12)


def test_sanitizers():
    require("msrq_encode_projected", "native")
    check_sanitized(SCRIPT, cases=6)


def test_random_shapes_of_the_projection():
    """The native 1x1 convolution alone, over widths that leave parts of tiles."""
    require("msrq_encode_projected", "native")
    rng = random.Random(0)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        batch, channels = rng.randint(0, 3), rng.randint(1, 300)
        length, outputs = rng.randint(1, 70), rng.randint(1, 40)
        x = torch.randn(batch, channels, length, generator=generator)
        weight, bias = torch.randn(outputs, channels, generator=generator), torch.randn(outputs, generator=generator)
        out = torch.ops.aar_native.msrq_project(x, weight, bias)
        plain = F.conv1d(x, weight[..., None], bias)
        assert_as_accurate(out, plain, F.conv1d(x.double(), weight.double()[..., None], bias.double()))


def test_levels_and_operators_agree():
    """The flat form has the arguments of the schemas, in order."""
    names = [argument.name for argument in torch.ops.aar_kernels.msrq_encode_projected.default._schema.arguments]
    assert names == ["x", *(field.name for field in dataclasses.fields(ProjectedLevels)), "backend"]
    assert {"encode_projected", "decode_projected"} <= set(ops.OPERATORS)
