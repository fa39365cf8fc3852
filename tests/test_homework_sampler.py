"""The check of a sampler: right solutions pass, and every wrong one fails for its own reason."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from graded import (
    check_command,
    check_fails_at,
    check_passes,
    check_stub,
    generating_stub,
    leaves,
    lines_of,
    name,
)
from limits import global_random_states
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor

from mplab.datasets import ShardSampler
from mplab.homework import check_shard_sampler

FINISHES = "every rank finishes"
OWN = "mplab's own is not called"
TRAFFIC = "messages and bytes that each rank sends"
ENDS = "every call ends"
LISTS = "lists of indices"
NUMBER = "as many batches on every rank"
WITHOUT = "no rank without a sample"
ONCE = "every sample exactly once"
SIZES = "samples of each batch"
OTHERS = "other batches in each epoch"
RANDOM = "the global random state is left alone"

Parts = Callable[[list[int], int], list[list[int]]]


def numpy_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(num_samples).tolist()
    return order


def torch_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    """As `torch.utils.data.DistributedSampler` seeds it."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def python_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(num_samples), num_samples)


def every_nth(batch: list[int], num_ranks: int) -> list[list[int]]:
    return [batch[rank::num_ranks] for rank in range(num_ranks)]


def in_a_row(batch: list[int], num_ranks: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(batch, num_ranks)]


def batches_of(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < num_ranks:
        rest = batches.pop()
        batches[-1] = batches[-1] + rest
    return batches


def sampled(
    num_samples: int,
    batch_size: int,
    rank: int,
    num_ranks: int,
    epoch: int,
    seed: int,
    order: Callable[[int, int, int], list[int]] = numpy_order,
    cut: Callable[[list[int], int, int], list[list[int]]] = batches_of,
    parts: Parts = every_nth,
) -> Iterator[list[int]]:
    for batch in cut(order(num_samples, epoch, seed), batch_size, num_ranks):
        yield parts(batch, num_ranks)[rank]


def as_a_list(*arguments: int) -> list[list[int]]:
    return list(sampled(*arguments, parts=in_a_row))


def of_tensors(*arguments: int) -> list[Tensor]:
    return [torch.tensor(part) for part in sampled(*arguments)]


RIGHT_SAMPLERS = [
    sampled,
    partial(sampled, order=torch_order),
    partial(sampled, order=python_order),
    as_a_list,
    of_tensors,
]


@pytest.mark.parametrize("solution", RIGHT_SAMPLERS, ids=name)
def test_right_samplers_pass(solution: Any) -> None:
    assert str(check_passes(check_shard_sampler, solution)).startswith("shard_sampler: 9 of 9 checks passed")


def unshuffled(num_samples: int, epoch: int, seed: int) -> list[int]:
    return list(range(num_samples))


def same_every_epoch(num_samples: int, epoch: int, seed: int) -> list[int]:
    return numpy_order(num_samples, 0, seed)


def same_for_every_seed(num_samples: int, epoch: int, seed: int) -> list[int]:
    return numpy_order(num_samples, epoch, 0)


def rolled(num_samples: int, epoch: int, seed: int) -> list[int]:
    order = list(range(num_samples))
    return order[epoch + seed :] + order[: epoch + seed]


def global_torch_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    torch.manual_seed(seed + epoch)
    return torch.randperm(num_samples).tolist()


def global_numpy_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    np.random.seed(seed + epoch)  # noqa: NPY002
    order: list[int] = np.random.permutation(num_samples).tolist()  # noqa: NPY002
    return order


def global_python_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    random.seed(seed + epoch)
    return random.sample(range(num_samples), num_samples)


def whatever_comes(num_samples: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(num_samples).tolist()


def with_replacement(num_samples: int, epoch: int, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).integers(num_samples, size=num_samples).tolist()
    return order


def another_order_per_rank(
    num_samples: int, batch_size: int, rank: int, num_ranks: int, epoch: int, seed: int
) -> Iterator[list[int]]:
    yield from sampled(num_samples, batch_size, rank, num_ranks, epoch, seed + rank)


def shuffled_batches(
    num_samples: int, batch_size: int, rank: int, num_ranks: int, epoch: int, seed: int
) -> list[list[int]]:
    """Only the order of the batches is new."""
    batches = list(sampled(num_samples, batch_size, rank, num_ranks, 0, 7))
    return [batches[i] for i in numpy_order(len(batches), epoch, seed)]


def rest_left_out(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]


def rest_alone(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def rest_first(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    return batches_of(order, batch_size, num_ranks)[::-1]


def rest_spread(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    num_batches = len(batches_of(order, batch_size, num_ranks))
    return [part.tolist() for part in np.array_split(order, num_batches)]


def filled_up_with_the_first(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    """As `torch.utils.data.DistributedSampler` does."""
    return rest_alone(order + order[: -len(order) % batch_size], batch_size, num_ranks)


def a_batch_a_rank(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    return rest_alone(order, batch_size * num_ranks, num_ranks)


def equal_parts(batch: list[int], num_ranks: int) -> list[list[int]]:
    size = len(batch) // num_ranks
    return [batch[rank * size : (rank + 1) * size] for rank in range(num_ranks)]


def rounded_up(batch: list[int], num_ranks: int) -> list[list[int]]:
    size = -(-len(batch) // num_ranks)
    return [batch[rank * size : (rank + 1) * size] for rank in range(num_ranks)]


def all_to_rank_0(batch: list[int], num_ranks: int) -> list[list[int]]:
    return [batch[: len(batch) - num_ranks + 1], *([i] for i in batch[len(batch) - num_ranks + 1 :])]


def the_whole(batch: list[int], num_ranks: int) -> list[list[int]]:
    return [batch] * num_ranks


def empty_ones_left_out(*arguments: int) -> list[list[int]]:
    return [part for part in sampled(*arguments, cut=rest_alone) if part]


def one_list(*arguments: int) -> list[int]:
    return [i for part in sampled(*arguments) for i in part]


def floats(*arguments: int) -> Iterator[list[float]]:
    return ([float(i) for i in part] for part in sampled(*arguments))


def from_1(*arguments: int) -> Iterator[list[int]]:
    return ([i + 1 for i in part] for part in sampled(*arguments))


def epoch_after_epoch(*arguments: int) -> Iterator[list[int]]:
    while True:
        yield from sampled(*arguments)


def spins(*arguments: int) -> Iterator[list[int]]:
    yield from sampled(*arguments)
    while True:
        pass


def nothing(*arguments: int) -> None:
    return None


class Place(NamedTuple):
    """What a sampler looks at in a communicator."""

    rank: int
    size: int


def library_sampler(
    num_samples: int, batch_size: int, rank: int, num_ranks: int, epoch: int, seed: int
) -> Iterator[list[int]]:
    sampler = ShardSampler(num_samples, batch_size, Place(rank, num_ranks), seed)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    yield from sampler


WRONG_SAMPLERS: list[tuple[Any, list[str]]] = [
    (partial(sampled, order=unshuffled), [OTHERS]),
    (partial(sampled, order=same_every_epoch), [OTHERS]),
    (partial(sampled, order=same_for_every_seed), [OTHERS]),
    (partial(sampled, order=rolled), [OTHERS]),
    (shuffled_batches, [SIZES, OTHERS]),
    (partial(sampled, order=global_torch_order), [RANDOM]),
    (partial(sampled, order=global_numpy_order), [RANDOM]),
    (partial(sampled, order=global_python_order), [RANDOM]),
    (partial(sampled, order=whatever_comes), [ONCE, RANDOM]),
    (partial(sampled, order=with_replacement), [ONCE]),
    (another_order_per_rank, [ONCE]),
    (partial(sampled, parts=the_whole), [ONCE]),
    (partial(sampled, parts=equal_parts), [ONCE]),
    (partial(sampled, cut=rest_left_out), [NUMBER, ONCE]),
    (partial(sampled, cut=filled_up_with_the_first), [NUMBER, ONCE]),
    (partial(sampled, cut=rest_alone), [NUMBER, WITHOUT]),
    (empty_ones_left_out, [NUMBER]),
    (partial(sampled, cut=a_batch_a_rank), [NUMBER, WITHOUT]),
    (epoch_after_epoch, [NUMBER, ONCE]),
    (partial(sampled, cut=rest_first), [SIZES]),
    (partial(sampled, cut=rest_spread), [SIZES]),
    (partial(sampled, parts=rounded_up), [WITHOUT, SIZES]),
    (partial(sampled, parts=all_to_rank_0), [SIZES]),
    (one_list, [LISTS]),
    (floats, [LISTS]),
    (from_1, [LISTS]),
    (nothing, [ENDS]),
    (spins, [ENDS]),
    (leaves, [ENDS]),
    (library_sampler, [OWN]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_SAMPLERS, ids=[name(s) for s, _ in WRONG_SAMPLERS])
def test_wrong_samplers_fail_for_their_own_reason(solution: Any, reasons: list[str]) -> None:
    check_fails_at(check_shard_sampler, solution, reasons)


# --- what the report says ---------------------------------------------------------------------------------------------


def test_a_stub_is_no_failure() -> None:
    check_stub(check_shard_sampler)


def test_a_generating_stub_is_no_failure() -> None:
    assert not check_shard_sampler(generating_stub).is_written


@pytest.mark.parametrize(
    ("solution", "line", "hint"),
    [
        (another_order_per_rank, ONCE, "never with the rank"),
        (partial(sampled, cut=filled_up_with_the_first), ONCE, "samples that came before"),
        (partial(sampled, parts=equal_parts), ONCE, "trained on too"),
        (partial(sampled, cut=rest_alone), NUMBER, "give these to the one before"),
        (empty_ones_left_out, NUMBER, "waiting in their all-reduce"),
        (partial(sampled, cut=a_batch_a_rank), NUMBER, "all ranks together"),
        (partial(sampled, order=global_torch_order), RANDOM, "generator of your own"),
        (partial(sampled, order=same_every_epoch), OTHERS, "seeded with both"),
    ],
    ids=name,
)
def test_hints_for_a_sampler(solution: Any, line: str, hint: str) -> None:
    assert hint in lines_of(check_shard_sampler(solution))[line].hint


def test_what_comes_after_a_failure_is_not_checked() -> None:
    assert lines_of(check_shard_sampler(floats))[ONCE].outcome == "not checked"
    assert lines_of(check_shard_sampler(another_order_per_rank))[SIZES].outcome == "not checked"


def test_a_change_of_the_global_random_states_is_undone() -> None:
    before = global_random_states()
    for order in (global_torch_order, global_numpy_order, global_python_order):
        check_shard_sampler(partial(sampled, order=order))
    assert global_random_states() == before


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "def shard_sampler(num_samples, batch_size, rank, num_ranks, epoch, seed):\n    return [[rank]]\n"
    check_command(code, tmp_path, capsys)
