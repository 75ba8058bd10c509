"""The random numbers: Philox itself, and on what a draw does not depend."""

from __future__ import annotations

import torch
from sampling_cases import draw_call

from aar_kernels.sampling import sample
from aar_kernels.sampling.reference import philox, uniform

# Known answers of philox4x32-10 in Random123's kat_vectors: counter, key, result.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def test_philox_known_answers():
    for counter, key, result in KNOWN:
        words = philox(*(tuple(torch.tensor([word]) for word in words) for words in (counter, key)))
        assert tuple(word.item() for word in words) == result


def test_uniform_is_53_bits_of_philox():
    """The counter is the token's index, the key the seed, low words first."""
    for seed, token in ((0, 0), (-1, 5), (2**40 + 3, 2**33 + 1)):
        words = [token & 0xFFFFFFFF, token >> 32, 0, 0, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
        tensors = [torch.tensor([word]) for word in words]
        high, low, *_ = (word.item() for word in philox(tuple(tensors[:4]), tuple(tensors[4:])))
        u = uniform(torch.tensor(seed), torch.tensor([token])).item()
        assert u == ((high << 32 | low) >> 11) / 2**53


def test_the_first_code_beyond_the_running_sum(backend):
    """Over equal codes, whose number is a power of two, the code is the head of the uniform number."""
    codes = sample(torch.zeros(3, 200, 64), seeds=torch.tensor([0, 7, -1]), position=11, backend=backend)
    u = uniform(torch.tensor([[0], [7], [-1]]), torch.arange(11, 211))
    assert torch.equal(codes, (u * 64).long())


def call_of_items(backend: str) -> tuple:
    call = draw_call(3, vocabulary=100, rows=40) | {"temperature": 1.0, "guidance": 2.0, "top_k": 50, "top_p": 0.9}
    generator = torch.Generator().manual_seed(0)
    logits, uncond = torch.randn(2, 4, 30, 100, generator=generator)
    call |= {"logits": logits, "uncond": uncond, "seeds": torch.tensor([4, -9, 4, 2**62]), "position": 0}
    return call, sample(**call, backend=backend)


def test_a_draw_does_not_depend_on_the_batch(backend):
    call, codes = call_of_items(backend)
    for i in range(4):
        item = {name: call[name][i : i + 1] for name in ("logits", "uncond", "seeds")}
        assert torch.equal(sample(**call | item, backend=backend), codes[i : i + 1])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: call[name][order] for name in ("logits", "uncond", "seeds")}
    assert torch.equal(sample(**call | shuffled, backend=backend), codes[order])


def test_a_draw_does_not_depend_on_the_split_over_calls(backend):
    call, codes = call_of_items(backend)
    parts, position = [], 0
    for n in (1, 2, 0, 7, 20):
        part = {name: call[name][:, position : position + n] for name in ("logits", "uncond")}
        parts.append(sample(**call | part | {"position": position}, backend=backend))
        position += n
    assert position == codes.shape[1]
    assert torch.equal(torch.cat(parts, dim=1), codes)


def test_seeds_and_positions_make_different_draws(backend):
    draw = lambda seed, position: sample(  # noqa: E731
        torch.zeros(1, 64, 1024), seeds=torch.tensor([seed]), position=position, backend=backend
    )
    draws = [draw(seed, position) for seed in (0, 1, 2**32, -1) for position in (0, 64, 2**32)]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert (first == second).float().mean() < 0.1
