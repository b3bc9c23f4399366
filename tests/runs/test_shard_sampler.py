"""The order of samples in shards: each once, a few shards at a time, ranks in parts, from the middle of an epoch."""

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from ssd_addon.runs import ResumableLoader, ResumableSampler, ShardSampler

SHARDS = torch.arange(10).repeat_interleave(7)  # 10 shards of 7


def order(rank: int = 0, ranks: int = 1, mixed: int = 2, epoch: int = 0, start: int = 0, seed: int = 0, shards=SHARDS):
    sampler = ShardSampler(shards, mixed=mixed, num_replicas=ranks, rank=rank, seed=seed)
    sampler.set_epoch(epoch)
    sampler.start = start
    return list(sampler)


def test_each_sample_comes_once_in_an_order_of_its_epoch_and_seed():
    first = order()
    assert sorted(first) == list(range(70)) and first == order()
    assert len({tuple(order(epoch=e, seed=s)) for e in (0, 1) for s in (0, 5)}) == 4


@pytest.mark.parametrize("mixed", [1, 3])
def test_so_many_shards_are_read_at_a_time_and_mixed(mixed):
    for epoch in range(3):
        found = SHARDS[order(mixed=mixed, epoch=epoch)]
        windows = found.split(7 * mixed)
        assert [len(w.unique()) for w in windows] == [mixed] * (9 // mixed) + [1] * (10 % mixed or mixed == 1)
        if mixed > 1:
            assert all(len(w.unique_consecutive()) > mixed for w in windows if len(w) == 7 * mixed)
            assert {len(w[:7].unique()) for w in windows} != {1}
    inside = torch.tensor(order(mixed=mixed)).split(7 * mixed)[0]
    assert inside.tolist() != sorted(inside.tolist())


def test_shards_take_turns_in_being_mixed_with_each_other():
    together = {frozenset(SHARDS[order(epoch=e)[:14]].tolist()) for e in range(8)}
    assert len(together) > 4


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_have_parts_of_equal_length_and_share_few_shards(ranks):
    parts = [order(rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {-(-70 // ranks)}
    both = [i for part in parts for i in part]
    assert set(both) == set(range(70)) and len(both) - 70 == -70 % ranks
    assert sum(len(SHARDS[part].unique()) for part in parts) <= 10 + ranks


def test_an_order_goes_on_where_it_was_left():
    for rank in (0, 1):
        assert order(rank, 2, start=11, epoch=3) == order(rank, 2, epoch=3)[11:]


def test_fewer_samples_than_ranks_are_repeated():
    parts = [order(rank, 5, shards=torch.tensor([0, 0])) for rank in range(5)]
    assert [len(part) for part in parts] == [1] * 5 and {i for part in parts for i in part} == {0, 1}


@pytest.mark.parametrize("shards,mixed,got", [([], 1, "0 samples, mixed=1"), ([0], 0, "1 samples, mixed=0")])
def test_no_samples_and_no_shards_to_mix_are_refused(shards, mixed, got):
    with pytest.raises(ValueError, match=f"ShardSampler: expected samples, and at least one shard to mix: got {got}"):
        ShardSampler(shards, mixed=mixed, num_replicas=1, rank=0)


@pytest.mark.parametrize("make", [lambda: ResumableSampler(range(6), 1, 0, shuffle=False), lambda: ShardSampler(
    SHARDS[:6], mixed=1, num_replicas=1, rank=0)])  # fmt: skip
def test_a_start_holds_for_one_pass(make):
    sampler = make()
    whole = list(sampler)
    sampler.start = 4
    assert list(sampler) == whole[4:] and list(sampler) == whole and len(sampler) == 6


def test_a_sampler_of_ones_own_draws_by_the_loaders_seed():
    def loader():
        sampler = WeightedRandomSampler([1.0] * 8, 8, replacement=False)
        return ResumableLoader(range(8), batch_size=2, sampler=sampler, seed=1)

    whole, again = [b.tolist() for b in loader()], loader()
    again.load_state_dict({"epoch": 0, "batches": 2})
    assert [b.tolist() for b in again] == whole[2:]
    assert [b.tolist() for b in loader()] == whole
    own = RandomSampler(range(8), generator=torch.Generator())
    with pytest.raises(ValueError, match="by the loader's seed: got a RandomSampler with a generator of its own"):
        ResumableLoader(range(8), sampler=own)
    with pytest.raises(ValueError, match="got a RandomSampler with a generator of its own"):
        ResumableLoader(range(8), batch_sampler=BatchSampler(own, 2, drop_last=False))
