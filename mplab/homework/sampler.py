"""The check of a sampler: which samples each rank gets in each batch of an epoch."""

from __future__ import annotations

import dataclasses
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mplab.datasets import ShardSampler, shard
from mplab.homework.limited import ENDS, OWN, Attempt, attempt, borrowed, error, is_written, until_hopeless
from mplab.homework.report import Complaint, Report, check_all
from mplab.homework.watched import listed

MAX_STEPS = 100_000
SIZES = (  # samples, samples of a batch, ranks
    (24, 4, 1),
    (24, 4, 2),
    (25, 4, 2),  # one sample is left, and two ranks want one
    (27, 4, 2),  # three are left
    (35, 7, 3),  # a batch that n does not divide
    (37, 7, 3),  # two are left, and three ranks want one
    (30, 4, 4),  # two are left
    (20, 20, 4),  # one batch
)
ORDERS = ((0, 0), (1, 0), (2, 0), (0, 1))  # epoch, seed
ANSWERS = {
    ShardSampler.__init__.__code__: "ShardSampler",
    ShardSampler.__iter__.__code__: "ShardSampler",
    shard.__code__: "shard",
}
Solution = Callable[[int, int, int, int, int, int], Iterable[Sequence[int]]]


def check_shard_sampler(solution: Solution) -> Report:
    """Check `solution(num_samples, batch_size, rank, num_ranks, epoch, seed)`: this rank's part of each global batch.

    It is called for 1 to 4 ranks, three epochs and two seeds. An epoch has a random order, the same on every rank, with
    every sample exactly once. A global batch is `batch_size` samples in a row, of which a rank gets as many as the
    others or one more. What is left at the end is a batch of its own; where it has fewer samples than there are ranks,
    it goes to the batch before.

    Args:
        solution: yields or returns a list of indices for each batch. It may neither use nor change a global random
            state, such as torch's.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: none; all ranks come to the same order by themselves.
    """
    with _random_states_kept():
        epochs = until_hopeless(_epoch(solution, *size, *order) for size in SIZES for order in ORDERS)
    if not is_written([one.attempt for one in epochs]):
        return Report("shard_sampler", (), is_written=False)
    done = [one for one in epochs if one.attempt.error is None]
    lists = check_all("lists of indices", done, _no_indices)
    valid = done if lists.outcome == "passed" else []
    number = check_all("as many batches on every rank", valid, _numbers)
    even = valid if number.outcome == "passed" else []
    once = check_all("every sample exactly once", valid, _not_once)
    right = even if once.outcome == "passed" else []
    by_size = [[one for one in right if one.size == size] for size in dict.fromkeys(one.size for one in right)]
    several = [_Orders(some) for some in by_size if len(some[0].batches) > 1]
    lines = [
        check_all(ENDS, [one.attempt for one in epochs], error("look for a loop that doesn't end"), "1 to 4 ranks"),
        check_all(OWN, [one.attempt for one in epochs], borrowed),
        lists,
        number,
        check_all("no rank without a sample", valid, _without),
        once,
        check_all("samples of each batch", right, _sizes),
        check_all("other batches in each epoch", several, _same, "and with another seed"),
        check_all("the global random state is left alone", done, _changed),
    ]
    return Report("shard_sampler", tuple(lines))


@dataclass(frozen=True)
class _Epoch:
    """One epoch as all ranks see it.

    Args:
        num_samples: as the solution gets it, and so the next four.
        batch_size: over all ranks.
        num_ranks: of the world.
        epoch: which one.
        seed: of the order.
        attempt: its result has a list of batches for each rank.
        changed: global random states that were changed meanwhile.
    """

    num_samples: int
    batch_size: int
    num_ranks: int
    epoch: int
    seed: int
    attempt: Attempt = field(default_factory=lambda: Attempt(""))
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.size}, {self.order}"

    @property
    def error(self) -> BaseException | None:
        """What a solution raised."""
        return self.attempt.error

    @property
    def size(self) -> str:
        """Without the epoch."""
        ranks = f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"
        return f"{self.num_samples} samples, batches of {self.batch_size}, {ranks}"

    @property
    def order(self) -> str:
        """Which one of this size."""
        return f"epoch {self.epoch}, seed {self.seed}"

    @property
    def ranks(self) -> list[list[list[int]]]:
        """The indices in each batch of each rank."""
        return [[_indices(batch) or [] for batch in batches] for batches in self.attempt.result]

    @property
    def batches(self) -> list[list[list[int]]]:
        """The same by batches: for each of them the parts of the ranks."""
        return [list(parts) for parts in zip(*self.ranks, strict=False)]

    @property
    def contents(self) -> set[frozenset[int]]:
        """The samples of each batch over all ranks."""
        return {frozenset(i for part in parts for i in part) for parts in self.batches}


def _epoch(solution: Solution, num_samples: int, batch_size: int, num_ranks: int, epoch: int, seed: int) -> _Epoch:
    def call() -> list[list[Any]]:
        # More batches than samples need not be seen.
        return [
            list(islice(solution(num_samples, batch_size, rank, num_ranks, epoch, seed), num_samples + 1))
            for rank in range(num_ranks)
        ]

    one = _Epoch(num_samples, batch_size, num_ranks, epoch, seed)
    before = _random_states()
    tried = attempt(str(one), call, MAX_STEPS, ANSWERS)
    changed = tuple(name for name, state in _random_states().items() if state != before[name])
    return dataclasses.replace(one, attempt=tried, changed=changed)


@dataclass(frozen=True)
class _Orders:
    """Epochs of one size."""

    epochs: list[_Epoch]

    def __str__(self) -> str:
        return self.epochs[0].size


def _random_states() -> dict[str, Any]:
    """The global random states, so that they can be compared."""
    _, numbers, *rest = np.random.get_state()  # noqa: NPY002 (the one that must be left alone)
    return {
        "torch's": torch.get_rng_state().numpy().tobytes(),
        "numpy's": (np.asarray(numbers).tobytes(), *rest),
        "Python's": random.getstate(),
    }


@contextmanager
def _random_states_kept() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _indices(batch: Any) -> list[int] | None:
    """A batch as a list of whole numbers; None: it is none."""
    items = batch.tolist() if isinstance(batch, Tensor | np.ndarray) else batch
    if not isinstance(items, list | tuple | range) or any(isinstance(i, bool) for i in items):
        return None
    try:
        return [operator.index(i) for i in items]
    except TypeError:
        return None


def _no_indices(one: _Epoch) -> Complaint | None:
    for rank, batches in enumerate(one.attempt.result):
        for batch in batches:
            found = _indices(batch)
            if found is not None and all(0 <= i < one.num_samples for i in found):
                continue
            hint = "yield a list for each batch, of this rank's indices in it"
            return Complaint(f"indices from 0 to {one.num_samples - 1}", f"{_short(batch)} on rank {rank}", hint)
    return None


def _numbers(one: _Epoch) -> Complaint | None:
    whole, rest = divmod(one.num_samples, one.batch_size)
    want, got = whole + (rest >= one.num_ranks), [len(batches) for batches in one.ranks]
    if got == [want] * one.num_ranks:
        return None
    if len(set(got)) > 1:
        hint = "a rank with a batch less leaves the others waiting in their all-reduce: cut each global batch for all"
    elif 0 < rest < one.num_ranks:
        hint = f"{rest} of {one.num_ranks} ranks would have a sample of the last batch: give these to the one before"
    else:
        hint = "batch_size counts the samples of all ranks together; what is left at the end is a batch too"
    return Complaint(f"{want} on each rank", f"{listed(got)} on ranks 0 to {one.num_ranks - 1}", hint)


def _without(one: _Epoch) -> Complaint | None:
    for rank, batches in enumerate(one.ranks):
        empty = [place for place, batch in enumerate(batches) if not batch]
        if empty or not batches:
            seen = f"none in batch {empty[0]} of rank {rank}" if empty else f"no batch on rank {rank}"
            hint = "a last batch with fewer samples than ranks goes to the one before"
            return Complaint("one or more samples in each batch of each rank", seen, hint)
    return None


def _not_once(one: _Epoch) -> Complaint | None:
    counts = Counter(i for batches in one.ranks for batch in batches for i in batch)
    missing = [i for i in range(one.num_samples) if not counts[i]]
    repeated = [i for i, count in counts.items() if count > 1]
    if not missing and not repeated:
        return None
    seen = [f"missing: {_short(missing)}"] if missing else []
    seen += [f"more than once: {_short(sorted(repeated))}"] if repeated else []
    if missing and repeated:
        hint = "do all ranks cut the same order? Its generator is seeded with seed and epoch, and never with the rank"
    elif repeated:
        hint = "each rank takes its own part of a batch; none is filled up with samples that came before"
    else:
        hint = (
            "what does not make a whole batch, or equal parts of one, is trained on too: tensor_split leaves none out"
        )
    return Complaint(f"each of 0 to {one.num_samples - 1} once, over all ranks", "\n".join(seen), hint)


def _sizes(one: _Epoch) -> Complaint | None:
    batches = one.batches
    want = [one.batch_size] * (len(batches) - 1)
    want.append(one.num_samples - sum(want))
    got = [sum(map(len, parts)) for parts in batches]
    if got != want:
        hint = "a global batch is batch_size samples, over all ranks together; only the last one may differ"
        return Complaint(f"{listed(want)} samples, over all ranks", listed(got), hint)
    for place, parts in enumerate(batches):
        lengths = [len(part) for part in parts]
        if max(lengths) - min(lengths) > 1:
            hint = "all wait for the rank with the most: cut with tensor_split, or take every n-th sample"
            return Complaint("parts that differ by one sample at most", f"{listed(lengths)} in batch {place}", hint)
    return None


def _same(one: _Orders) -> Complaint | None:
    hint = "draw an order of all samples from a generator that is seeded with both, as default_rng((seed, epoch)) is"
    for a in one.epochs:
        batches = range(0, a.num_samples - 2 * a.batch_size, a.batch_size)
        if all(frozenset(range(start, start + a.batch_size)) in a.contents for start in batches):
            return Complaint(f"samples in a random order in {a.order}", "0, 1, 2, ... one after another", hint)
    for a, b in combinations(one.epochs, 2):
        if (a.seed == b.seed or a.epoch == b.epoch) and a.contents == b.contents:
            return Complaint(f"other batches in {b.order}", f"the same as in {a.order}", hint)
    return None


def _changed(one: _Epoch) -> Complaint | None:
    if not one.changed:
        return None
    hint = (
        "make a generator of your own: torch.Generator().manual_seed(...), or numpy.random.default_rng((seed, epoch))"
    )
    return Complaint("the random states as they were", f"{' and '.join(one.changed)} changed", hint)


def _short(items: Any) -> str:
    text = repr(items)
    return text if len(text) <= 60 else text[:57] + "..."
