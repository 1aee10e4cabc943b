"""The order of samples: a function of (seed, epoch), the same from any position and shared out among ranks."""

import pytest

from spikeformers.data.sampler import ResumableSampler


def drawn(sampler, epoch, start=0):
    sampler.set_position(epoch, start)
    return list(sampler)


def test_an_epoch_visits_every_sample_once_and_names_itself():
    keys = drawn(ResumableSampler(10, batch_size=5), 3)
    assert {epoch for epoch, _ in keys} == {3}
    assert sorted(index for _, index in keys) == list(range(10))


def test_the_order_changes_with_epoch_and_seed_only():
    sampler = ResumableSampler(50, batch_size=10, seed=1)
    first = drawn(sampler, 0)
    assert [i for _, i in first] != [i for _, i in drawn(sampler, 1)]
    assert first == drawn(ResumableSampler(50, batch_size=10, seed=1), 0)
    assert first != drawn(ResumableSampler(50, batch_size=10, seed=2), 0)


def test_the_order_is_fixed_for_ever():
    assert [i for _, i in drawn(ResumableSampler(6, batch_size=1, seed=0), 0)] == [2, 5, 3, 4, 0, 1]


def test_continuing_from_a_position_gives_the_rest_of_the_epoch():
    sampler = ResumableSampler(50, batch_size=10)
    assert drawn(sampler, 2, 30) == drawn(sampler, 2)[30:]
    sampler.set_position(2, 30)
    assert len(sampler) == 20


def test_two_ranks_take_the_batches_that_one_process_accumulates():
    one = [index for _, index in drawn(ResumableSampler(24, batch_size=4), 1)]
    ranks = [
        [index for _, index in drawn(ResumableSampler(24, batch_size=4, rank=rank, world=2), 1)] for rank in range(2)
    ]
    batches = [ranks[k % 2][4 * (k // 2) : 4 * (k // 2) + 4] for k in range(6)]
    assert one == [index for batch in batches for index in batch]


@pytest.mark.parametrize("length", [16, 17, 19, 23])
def test_length_is_what_is_yielded_and_an_incomplete_round_is_dropped(length):
    seen = []
    for rank in range(2):
        sampler = ResumableSampler(length, batch_size=4, rank=rank, world=2)
        keys = drawn(sampler, 0)
        assert len(sampler) == len(keys)
        seen += [index for _, index in keys]
    assert len(seen) == len(set(seen)) == 16


def test_impossible_shares_are_refused():
    said = "10 training samples are fewer than one batch of batch_size=64 in each of 1 process.*to at most 10"
    with pytest.raises(ValueError, match=said):
        ResumableSampler(10, batch_size=64)
    with pytest.raises(ValueError, match="rank must lie between 0 and world - 1 = 1, got 2"):
        ResumableSampler(10, batch_size=1, rank=2, world=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ResumableSampler(10, batch_size=0)
