"""Steps of many plans, timed in turn: what runs, what counts, what is left, what is refused. No time is judged."""

from __future__ import annotations

import gc
import importlib
import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hybrid import assert_same, batches, gpt, snapshot, state_of
from hypothesis import given
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab import MplabError, Plan, World
from mplab.datasets import Batch
from mplab.parallel import HybridParallel, measure_plans
from mplab.parallel.measure_plans import rank_correlation

MODULE = importlib.import_module("mplab.parallel.measure_plans")  # the package has the function by this name
BATCH = batches()[0]
PLANS = [
    Plan(),
    Plan(dp=2),
    Plan(pp=2, num_microbatches=4, schedule="zero_bubble"),
    Plan(dp=2, tp=2, zero=3),
    Plan(1, 2, 2, num_microbatches=2, recompute=True, sequence_parallel=True),
]
SGD = partial(torch.optim.SGD, lr=0.1)


def test_every_plan_has_a_time_of_every_round() -> None:
    model = gpt()
    before, seen = snapshot(model), state_of(model)
    seconds = measure_plans(model, PLANS, BATCH, 2, 1)
    assert list(seconds) == PLANS
    for times in seconds.values():
        assert len(times) == 2
        assert min(times) > 0
    assert_same(model.state_dict(), before)
    assert state_of(model) == seen


class Watched(HybridParallel):
    """Says which plan is laid out and how often it steps, and which engines are there at the same time."""

    made: ClassVar[list[weakref.ref[Watched]]] = []
    log: ClassVar[list[tuple[str, Plan]]] = []
    frozen: ClassVar[list[str]] = []

    def __init__(self, model: Any, comm: Any, plan: Plan, **options: Any) -> None:
        alive = [engine.plan for made in self.made if (engine := made()) is not None]
        assert set(alive) <= {plan}  # of this run's other ranks
        super().__init__(model, comm, plan, **options)
        assert type(self.optimizer) is torch.optim.SGD
        self.made.append(weakref.ref(self))
        if comm.rank == 0:
            self.log.append(("made", plan))
        comm.barrier()

    def step(self, batch: Batch) -> float:
        assert batch is BATCH
        assert self.frozen == ["freeze"]
        if self.comm.rank == 0:
            self.log.append(("step", self.plan))
        return super().step(batch)


def remember(name: str) -> None:
    Watched.frozen.append(name)


def test_what_the_caller_has_frozen_stays_so() -> None:
    num_frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        measure_plans(gpt(), PLANS[1:2], BATCH, 1, 1, SGD)
        assert gc.get_freeze_count() > num_frozen
    finally:
        if not num_frozen:
            gc.unfreeze()


def test_plans_take_turns_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "HybridParallel", Watched)
    monkeypatch.setattr(Watched, "made", [])
    monkeypatch.setattr(Watched, "log", [])
    monkeypatch.setattr(Watched, "frozen", [])
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)  # as Python 3.12 begins, with torch loaded
    monkeypatch.setattr(gc, "get_objects", lambda: [None] * 300_000)
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, partial(remember, name))
    a, b, c = PLANS[1:4]
    measure_plans(gpt(), iter([a, b, c]), BATCH, 3, 2, SGD)
    turns = [("made", plan) if k == 0 else ("step", plan) for plan in (a, b, c, c, b, a, a, b, c) for k in range(4)]
    assert Watched.log == turns
    assert Watched.frozen == ["freeze", "unfreeze"]
    gc.collect()
    assert not any(made() for made in Watched.made)


def test_a_step_lasts_from_last_to_last_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is the last in one step, rank 0 in the next ones: 7, 20 and 3 s, by the nanosecond."""
    stamps = [[1, 9, 30, 33], [3, 10, 12, 14]]
    worlds: list[tuple[int, str]] = []

    class Known:
        def __init__(self, num_ranks: int, device: str) -> None:
            worlds.append((num_ranks, device))

        def run(self, *_: Any) -> Sequence[Sequence[int]]:
            return [[ns * 10**9 for ns in of_rank] for of_rank in stamps]

    monkeypatch.setattr(MODULE, "World", Known)
    assert [*measure_plans(gpt(), [Plan(dp=2), Plan(tp=4)], BATCH, 2).values()] == [pytest.approx([7.0, 7.0])] * 2
    assert worlds == [(2, "cpu"), (4, "cpu"), (4, "cpu"), (2, "cpu")]


def test_every_rank_says_when_it_had_each_step() -> None:
    stamps = World(2, "cpu").run(MODULE._stamps, gpt(), Plan(dp=2), BATCH, 3, SGD)
    for of_rank in stamps:
        assert len(of_rank) == 4
        assert of_rank == sorted(of_rank)


def test_progress_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, str]] = []

    def progress(items: Sequence[Plan], num_items: int, name: str, unit: str) -> Sequence[Plan]:
        shown.append((num_items, unit))
        return items

    monkeypatch.setattr(MODULE, "progress", progress)
    measure_plans(gpt(), PLANS[:2], BATCH, 2, 1)
    assert shown == [(4, "plan")]


@pytest.mark.parametrize(
    ("plans", "options", "said"),
    [
        ([], {}, ["no plans"]),
        ([Plan(), Plan(dp=2), Plan()], {}, ["1 x 1 x 1 ranks", "is there 2 times"]),
        ([Plan()], {"num_rounds": 0}, ["num_rounds 0"]),
        ([Plan()], {"num_steps": 1.5}, ["num_steps 1.5"]),
        ([Plan()], {"optimizer": None}, ["optimizer is a NoneType"]),
        ([Plan()], {"model": 3}, ["model is a int"]),
        ([Plan()], {"batch": (torch.zeros(2), torch.zeros(3))}, ["2 inputs and 3 targets"]),
        (
            [Plan(tp=3), Plan(dp=2, num_microbatches=9), Plan(pp=9), Plan(dp=2)],
            {},
            ["1 x 1 x 3 ranks", "a batch of 17 samples is too small: take 18 or more", "1 x 9 x 1 ranks"],
        ),
    ],
    ids=str,
)
def test_what_is_refused(
    plans: list[Plan], options: dict[str, Any], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "World", lambda *_: pytest.fail("a world was made"))
    with pytest.raises(MplabError) as refused:
        measure_plans(**{"model": gpt(), "plans": plans, "batch": BATCH} | options)
    for words in said:
        assert words in str(refused.value)
    assert not [*MODULE._faults(gpt(), [Plan(num_microbatches=17)], 17)]  # one sample in each
    if len(plans) == 4:  # the first three, and not the last
        assert str(refused.value).count(" does not fit:") == 2


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    # equal values: ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=8), st.integers(0, 100))
def test_rank_correlation_is_the_correlation_of_mean_ranks(values: list[int], seed: int) -> None:
    other = np.random.default_rng(seed).permutation(len(values))
    if len(set(values)) == 1:
        return
    ranks = [(sum(w < v for w in values) + sum(w <= v for w in values) + 1) / 2 for v in values]
    assert rank_correlation(values, [*other]) == pytest.approx(np.corrcoef(ranks, other)[0, 1])
    assert rank_correlation([v**3 for v in values], [*other]) == pytest.approx(rank_correlation(values, [*other]))
