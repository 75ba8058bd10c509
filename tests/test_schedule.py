import pickle

import pytest
import torch

from aar_kernels import GridSchedule, ScaleSchedule

PUBLISHED = (1, 2, 4, 6, 9, 12, 16, 20, 25, 31, 37, 43, 50, 58, 66, 75)


def test_the_published_schedule():
    schedule = ScaleSchedule.quadratic(16, 75)
    assert schedule.lengths == PUBLISHED
    assert (schedule.total, schedule.length, schedule.num_scales) == (455, 75, 16)


def test_the_papers_other_schedules():
    assert ScaleSchedule.linear(16, 75).total == 601
    assert ScaleSchedule.logarithmic(16, 75).total == 291


@pytest.mark.parametrize("kind", [ScaleSchedule.quadratic, ScaleSchedule.linear, ScaleSchedule.logarithmic])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 75, 100, 121, 1000, 4097])
def test_every_kind_ends_at_its_length(kind, length):
    """Rounding of the root or the logarithm must not shorten the last scale, nor the one of a single
    scale."""
    for scales in (1, 2, 5, 16):
        schedule = kind(scales, length)
        assert schedule.num_scales == scales
        assert schedule.length == length
        assert list(schedule.lengths) == sorted(schedule.lengths)
        assert schedule.lengths[0] == (1 if scales > 1 else length)


@pytest.mark.parametrize("lengths", [[], [0], [3, -1, 5]])
def test_wrong_lengths(lengths):
    with pytest.raises(ValueError, match="each at least 1"):
        ScaleSchedule(lengths)


def test_no_scales():
    with pytest.raises(ValueError, match="at least one scale"):
        ScaleSchedule.quadratic(0, 75)


def test_offsets_and_slices_partition_the_tokens():
    schedule = ScaleSchedule((2, 5, 3))
    assert schedule.offsets == (0, 2, 7, 10)
    tokens = list(range(10))
    assert [tokens[part] for part in schedule.slices()] == [[0, 1], [2, 3, 4, 5, 6], [7, 8, 9]]
    assert schedule.scale_of_token().tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]


def test_mask_is_block_causal():
    mask = ScaleSchedule((1, 2, 2)).mask()
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("lengths", [PUBLISHED, (3, 1, 4, 1, 5), (7,)])
def test_mask_mod_and_pairs_agree_with_the_mask(lengths):
    schedule = ScaleSchedule(lengths)
    index = torch.arange(schedule.total)
    zero = torch.zeros((), dtype=torch.int64)
    seen = schedule.mask_mod(zero, zero, index[:, None], index[None])
    assert torch.equal(seen.expand(len(index), len(index)), schedule.mask())
    assert schedule.attention_pairs == schedule.mask().sum()


def test_published_numbers_of_cost():
    schedule = ScaleSchedule.quadratic(16, 75)
    assert schedule.attention_pairs / schedule.total**2 == pytest.approx(0.552, abs=5e-4)
    assert schedule.flops(latent_dim=64, codebook_size=1024) == pytest.approx(59.6e6, rel=1e-3)


def test_mask_mod_runs_in_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask

    schedule = ScaleSchedule((2, 5, 9))
    block_mask = create_block_mask(schedule.mask_mod, None, None, 16, 16, device="cpu", BLOCK_SIZE=1)
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), schedule.mask())


def test_a_schedule_is_a_value():
    schedule = ScaleSchedule([1, 2])
    assert schedule == ScaleSchedule((1, 2))
    assert hash(schedule) == hash(ScaleSchedule((1, 2)))
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    with pytest.raises(AttributeError):
        schedule.lengths = (3,)


def test_picture_has_a_mark_for_every_token():
    lines = ScaleSchedule((1, 4, 8)).picture(width=16).splitlines()
    assert [line.count("|") for line in lines] == [1, 4, 8]


def test_grids():
    schedule = GridSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert (schedule.total, schedule.length, schedule.grid) == (680, 256, (16, 16))
    other = GridSchedule([(1, 3), 2, (4, 1)])
    assert other.grids == ((1, 3), (2, 2), (4, 1))
    assert (other.lengths, other.widths) == ((3, 4, 4), (3, 2, 1))
    assert torch.equal(other.mask(), ScaleSchedule((3, 4, 4)).mask())
    assert other != ScaleSchedule((3, 4, 4))
    assert ScaleSchedule((3, 4, 4)) != other
    assert other != GridSchedule([(3, 1), 2, (4, 1)])
    assert pickle.loads(pickle.dumps(other)) == other
    assert eval(repr(other)) == other
    assert len({other, GridSchedule([(1, 3), 2, (4, 1)])}) == 1


@pytest.mark.parametrize("grids", [[], [0], [(1, 0)], [(2, 2), -1]])
def test_wrong_grids(grids):
    with pytest.raises(ValueError, match="sides of at least 1"):
        GridSchedule(grids)
