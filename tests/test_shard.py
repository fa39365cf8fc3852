"""Every sample goes to one rank, once: batches cut by ranks, and indices for a loader."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from mplab import MplabError, World
from mplab.datasets import Batch, Dataset, ShardSampler, shard
from mplab.datasets.dataset import epoch_order


class Place(NamedTuple):
    """All that is asked of a communicator."""

    rank: int
    size: int


def places(num_ranks: int) -> list[Any]:
    return [Place(rank, num_ranks) for rank in range(num_ranks)]


class Numbers(Dataset):
    """Sample i is the number i, and its target -i."""

    def samples(self, indices: torch.Tensor) -> Batch:
        return indices, -indices


def samplers(num_ranks: int, num_samples: int, batch_size: int, **options: Any) -> list[ShardSampler]:
    return [ShardSampler(num_samples, batch_size, comm, **options) for comm in places(num_ranks)]


# --- a batch ---------------------------------------------------------------------------------------------------------


@given(num_samples=st.integers(1, 40), num_ranks=st.integers(1, 9))
def test_every_sample_is_on_one_rank(num_samples: int, num_ranks: int) -> None:
    batch = torch.rand(num_samples, 3, generator=torch.Generator().manual_seed(0)), torch.arange(num_samples)
    parts = [shard(batch, comm) for comm in places(num_ranks)]
    for whole, of_ranks in zip(batch, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(of_ranks), whole)
    lengths = [len(inputs) for inputs, _ in parts]
    assert lengths == [len(targets) for _, targets in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def test_a_shard_is_a_view() -> None:
    batch = torch.arange(5), torch.arange(5)
    for x, part in zip(batch, shard(batch, places(2)[1]), strict=True):
        assert part.tolist() == [3, 4]
        assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_ranks_have_nothing_to_say_to_each_other() -> None:
    world = World(3, "cpu")
    shards = world.run(lambda rank: shard((torch.arange(7), torch.arange(7)), rank.comm)[0].tolist())
    assert shards == [[0, 1, 2], [3, 4], [5, 6]]
    assert [ledger.messages for ledger in world.ledgers] == [[], [], []]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(3)), "^4 inputs and 3 targets: a batch needs as many of each$"),
        ((torch.zeros(0, 2), torch.zeros(0)), "^a batch without samples can't be shared out"),
    ],
)
def test_batches_that_are_refused_on_every_rank(batch: Batch, message: str) -> None:
    for comm in places(3):
        with pytest.raises(MplabError, match=message):
            shard(batch, comm)


# --- a loader's indices ----------------------------------------------------------------------------------------------


@given(
    num_ranks=st.integers(1, 5),
    more_in_batch=st.integers(0, 9),
    more_samples=st.integers(0, 60),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_every_sample_once_an_epoch(
    num_ranks: int, more_in_batch: int, more_samples: int, epoch: int, shuffle: bool, drop_last: bool
) -> None:
    batch_size = num_ranks + more_in_batch
    num_samples = batch_size + more_samples
    of_ranks = samplers(num_ranks, num_samples, batch_size, shuffle=shuffle, drop_last=drop_last)
    for sampler in of_ranks:
        sampler.set_epoch(epoch)
    indices = [list(sampler) for sampler in of_ranks]
    assert {len(sampler) for sampler in of_ranks} == {len(mine) for mine in indices}
    assert all(len(part) > 0 for mine in indices for part in mine)
    order = epoch_order(num_samples, 0, epoch).tolist() if shuffle else list(range(num_samples))
    whole = [list(itertools.chain(*parts)) for parts in zip(*indices, strict=True)]
    in_order = list(itertools.chain(*whole))
    assert in_order == order[: len(in_order)]
    left_out = num_samples - len(in_order)
    assert left_out == (num_samples % batch_size if drop_last else 0)
    assert all(len(batch) == batch_size for batch in whole[:-1])
    assert num_ranks <= len(whole[-1]) < batch_size + num_ranks


def test_a_batch_is_that_of_the_dataset_shared_out() -> None:
    data = Numbers(23, 0, 5, seed=4)
    for comm in places(3):
        sampler = ShardSampler(23, 5, comm, seed=4)
        for epoch in (2, 0):
            sampler.set_epoch(epoch)
            for place, indices in enumerate(itertools.islice(sampler, data.num_batches)):
                assert indices == shard(data.batch(epoch * data.num_batches + place), comm)[0].tolist()


def test_a_rest_with_too_few_samples_is_joined_to_the_last_batch() -> None:
    lengths = {n: [len(part) for part in samplers(3, n, 6, shuffle=False)[0]] for n in range(12, 18)}
    assert lengths == {12: [2, 2], 13: [2, 3], 14: [2, 3], 15: [2, 2, 1], 16: [2, 2, 2], 17: [2, 2, 2]}
    first, second, third = (list(sampler)[-1] for sampler in samplers(3, 14, 6, shuffle=False))
    assert (first, second, third) == ([6, 7, 8], [9, 10, 11], [12, 13])


def test_an_epoch_has_an_order_of_its_own_and_the_seed_another() -> None:
    sampler = samplers(2, 20, 4)[0]
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(samplers(2, 20, 4, seed=1)[0]) != first


def test_a_loader_of_torch() -> None:
    """Each epoch all samples, once; and the global generator is left alone."""
    data = TensorDataset(torch.arange(11), -torch.arange(11))
    of_ranks = samplers(3, 11, 4)
    loaders = [DataLoader(data, batch_sampler=s, generator=torch.Generator().manual_seed(0)) for s in of_ranks]
    before = torch.get_rng_state()
    orders = []
    for epoch in range(2):
        for sampler in of_ranks:
            sampler.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        assert [len(of_rank) for of_rank in batches] == [len(loader) for loader in loaders] == [3, 3, 3]
        seen = [inputs for step in zip(*batches, strict=True) for inputs, _ in step]
        assert all(torch.equal(-x, y) for of_rank in batches for x, y in of_rank)
        orders.append(torch.cat(seen).tolist())
        assert sorted(orders[-1]) == list(range(11))
    assert orders[0] != orders[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "seed", "message"),
    [
        (20, 3, 0, "^batch_size 3: it counts the samples of all ranks together, and must be from 4, one for each rank"),
        (20, 21, 0, "to the 20 samples that there are$"),
        (3, 3, 0, "batch_size 3"),
        (0, 4, 0, "to the 0 samples"),
        (20, 4, -1, "^seed -1: must be 0 or more$"),
    ],
)
def test_samplers_that_are_refused_on_every_rank(num_samples: int, batch_size: int, seed: int, message: str) -> None:
    for comm in places(4):
        with pytest.raises(MplabError, match=message):
            ShardSampler(num_samples, batch_size, comm, seed)


def test_an_epoch_below_0_is_refused() -> None:
    with pytest.raises(MplabError, match=r"^epoch -1: must be 0 or more$"):
        samplers(2, 4, 4)[0].set_epoch(-1)
