"""The checks of lab 03: right solutions pass, and every wrong one fails for the reason that is its own."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from graded import check_command, check_fails_at, check_stub, generating_stub, name

from mplab.homework import (
    Report,
    check_fastest_num_microbatches,
    check_one_f_one_b,
    check_optimal_cut,
)
from mplab.homework.limited import TooManySteps, attempt
from mplab.plan import partition, schedule
from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost
from mplab.plan.schedule import Action
from mplab.plan.simulate import simulate

ENDS = "every call ends"
OWN = "mplab's own is not called"


# --- 1F1B -------------------------------------------------------------------------------------------------------------

COMPLETE = "each micro-batch once forward, once backward"
WAITS = "no rank waits for ever"
LENGTH = "length of the schedule"
IN_FLIGHT = "micro-batches in flight"
LOSS = "the loss is that of serial training"


def right_order(rank: int, num_ranks: int, num_microbatches: int, num_more: int = 0) -> Iterator[Action]:
    num_warmup = min(num_ranks - 1 - rank + num_more, num_microbatches)
    for j in range(num_warmup):
        yield Action(rank, "F", j)
    for j in range(num_microbatches - num_warmup):
        yield Action(rank, "F", num_warmup + j)
        yield Action(rank, "B", j)
    for j in range(num_microbatches - num_warmup, num_microbatches):
        yield Action(rank, "B", j)


def list_of_texts(rank: int, num_ranks: int, num_microbatches: int) -> list[str]:
    return list(map(str, right_order(rank, num_ranks, num_microbatches)))


def last_microbatch_first(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    for stage, kind, j in right_order(rank, num_ranks, num_microbatches):
        yield Action(stage, kind, num_microbatches - 1 - j)


@pytest.mark.parametrize("solution", [right_order, list_of_texts, last_microbatch_first], ids=name)
def test_right_orders_pass(solution: Any) -> None:
    before = torch.get_rng_state()
    report = check_one_f_one_b(solution)
    assert torch.equal(torch.get_rng_state(), before), "the learner's random numbers are his own"
    assert report.passed, str(report)
    assert str(report).startswith("one_f_one_b: 7 of 7 checks passed")


def gpipe(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    for kind in ("F", "B"):
        for j in range(num_microbatches):
            yield Action(rank, kind, j)  # type: ignore[arg-type]


def naive(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    for j in range(num_microbatches):
        yield Action(rank, "F", j)
        yield Action(rank, "B", j)


def as_many_on_every_rank(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    for action in right_order(0, num_ranks, num_microbatches):
        yield action._replace(stage=rank)


def one_too_few(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    yield from right_order(rank, max(rank + 1, num_ranks - 1), num_microbatches)


def without_the_last_backwards(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    return list(right_order(rank, num_ranks, num_microbatches))[: 2 * num_microbatches - (num_ranks - 1 - rank)]


def forwards_beyond_the_last(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Forgets that there may be fewer micro-batches than ranks."""
    for j in range(num_ranks - 1 - rank):
        yield Action(rank, "F", j)
    yield from list(right_order(rank, num_ranks, num_microbatches))[min(num_ranks - 1 - rank, num_microbatches) :]


def backward_first(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    order = list(right_order(rank, num_ranks, num_microbatches))
    yield from order[::-1] if rank == num_ranks - 1 else order


def other_stages(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    yield from right_order(num_ranks - 1 - rank, num_ranks, num_microbatches)


def split_backward(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    for action in right_order(rank, num_ranks, num_microbatches):
        yield from [action] if action.kind == "F" else [action._replace(kind="I"), action._replace(kind="W")]


def plain_letters(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[str]:
    for action in right_order(rank, num_ranks, num_microbatches):
        yield f"{action.kind}{action.microbatch}"


def plain_tuples(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[tuple[str, int]]:
    for action in right_order(rank, num_ranks, num_microbatches):
        yield action.kind, action.microbatch


def never_ends(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    yield from right_order(rank, num_ranks, num_microbatches)
    while True:
        pass


def yields_for_ever(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    while True:
        yield from right_order(rank, num_ranks, num_microbatches)


def nothing(rank: int, num_ranks: int, num_microbatches: int) -> None:
    return None


def leaves(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    sys.exit("enough")


def library_order(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    yield from schedule.build("1f1b", num_ranks, num_microbatches).ranks[rank]


WRONG_ORDERS: list[tuple[Any, list[str]]] = [
    (gpipe, [IN_FLIGHT]),
    (naive, [LENGTH, IN_FLIGHT]),
    (partial(right_order, num_more=1), [IN_FLIGHT]),
    (as_many_on_every_rank, [LENGTH, IN_FLIGHT]),
    (one_too_few, [LENGTH, IN_FLIGHT]),
    (without_the_last_backwards, [COMPLETE]),
    (forwards_beyond_the_last, [COMPLETE]),
    (backward_first, [WAITS]),
    (other_stages, [COMPLETE]),
    (split_backward, [COMPLETE]),
    (plain_letters, [COMPLETE]),
    (plain_tuples, [COMPLETE]),
    (yields_for_ever, [COMPLETE]),
    (never_ends, [ENDS]),
    (nothing, [ENDS]),
    (leaves, [ENDS]),
    (library_order, [OWN]),
    (schedule.one_f_one_b, [OWN]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_ORDERS, ids=[name(solution) for solution, _ in WRONG_ORDERS])
def test_wrong_orders_fail_for_their_own_reason(solution: Any, reasons: list[str]) -> None:
    check_fails_at(check_one_f_one_b, solution, reasons)


def test_gpipe_is_as_long_and_its_table_shows_what_it_holds() -> None:
    text = str(check_one_f_one_b(gpipe))
    assert "6 of 7 checks passed" in text
    assert (
        """\
  FAILED  micro-batches in flight
            case:     1 rank, 2 micro-batches
            expected: 1: min(p - rank, m)
            seen:     2
                      rank 0 | F0 F1 B0=== B1===
            hint:     as soon as rank r holds p - r micro-batches, it does a backward before its next forward
"""
        in text
    )


def test_a_deadlock_says_who_waits_for_whom() -> None:
    (line,) = [line for line in check_one_f_one_b(backward_first).lines if line.outcome == "failed"]
    assert line.case == "1 rank, 1 micro-batch"
    assert "rank 0 waits at 0B0, its action 0, for 0F0 of itself" in line.seen


def test_missing_actions_are_listed() -> None:
    (line,) = [line for line in check_one_f_one_b(without_the_last_backwards).lines if line.outcome == "failed"]
    assert line.case == "2 ranks, 1 micro-batch"
    assert line.seen == "0F0 on rank 0\nmissing: 0B0"


def test_an_order_that_trains_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No valid order does; so the run is broken instead."""
    monkeypatch.setattr("mplab.homework.pipeline.cross_entropy", lambda out, target: 2 * out.square().mean())
    check_fails_at(check_one_f_one_b, right_order, [LOSS])


# --- the best cuts ----------------------------------------------------------------------------------------------------

LAYERS = "every stage has a layer"
SLOWEST = "the slowest stage is as fast as can be"
INPUT = "the list of times is left alone"
STEPS = "steps on a long chain"


def table(times_s: list[float], num_stages: int) -> tuple[int, ...]:
    n = len(times_s)
    best = [(sum(times_s[:j]), ()) for j in range(n + 1)]
    for s in range(1, num_stages):
        new: list[Any] = [(math.inf, ())] * (n + 1)
        for j in range(s + 1, n + 1):
            for i in range(s, j):
                largest = max(best[i][0], sum(times_s[i:j]))
                if largest < new[j][0]:
                    new[j] = largest, (*best[i][1], i)
        best = new
    return best[n][1]


def recursive(times_s: list[float], num_stages: int) -> list[int]:
    sums = [0.0, *accumulate(times_s)]

    @cache
    def best(end: int, stages: int) -> tuple[float, tuple[int, ...]]:
        if stages == 1:
            return sums[end], ()
        found = []
        for start in range(stages - 1, end):
            largest, cuts = best(start, stages - 1)
            found.append((max(largest, sums[end] - sums[start]), (*cuts, start)))
        return min(found)

    return list(best(len(times_s), num_stages)[1])


def sums_in_python(times_s: list[float], num_stages: int) -> list[int]:
    """O(n³ p): slower than need be, and still far from trying everything."""
    n, best = len(times_s), {0: (0.0, [])}
    for s in range(num_stages):
        new: dict[int, tuple[float, list[int]]] = {}
        for j in range(s + 1, n + 1):
            for i, (largest, cuts) in best.items():
                if i < j:
                    load = 0.0
                    for t in times_s[i:j]:
                        load += t
                    new[j] = min(new.get(j, (math.inf, [])), (max(largest, load), [*cuts, i] if s else []))
        best = new
    return best[n][1]


def by_bisection(times_s: list[float], num_stages: int) -> list[int]:
    """The least limit with which greedy stages will do."""
    sums = [0.0, *accumulate(times_s)]

    def cuts(limit: float) -> list[int]:
        found: list[int] = []
        for stage in range(num_stages):
            start = found[-1] if found else 0
            end = bisect_right(sums, sums[start] + limit) - 1
            found.append(max(start + 1, min(end, len(times_s) - (num_stages - 1 - stage))))
        return found

    low, high = max(times_s), sum(times_s)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if cuts(middle)[-1] == len(times_s) else (middle, high)
    return cuts(high)[:-1]


@pytest.mark.parametrize("solution", [table, recursive, sums_in_python, by_bisection], ids=name)
def test_right_cuts_pass(solution: Any) -> None:
    report = check_optimal_cut(solution)
    assert report.passed, str(report)
    assert str(report).startswith("optimal_cut: 6 of 6 checks passed")


def largest(times_s: list[float], cuts: Sequence[int]) -> float:
    return max(sum(times_s[a:b]) for a, b in pairwise([0, *cuts, len(times_s)]))


def brute_force(times_s: list[float], num_stages: int) -> tuple[int, ...]:
    return min(combinations(range(1, len(times_s)), num_stages - 1), key=lambda cuts: largest(times_s, cuts))


def recursion_without_memory(times_s: list[float], num_stages: int) -> list[int]:
    if num_stages == 1:
        return []
    ends = range(num_stages - 1, len(times_s))
    found = [[*recursion_without_memory(times_s[:i], num_stages - 1), i] for i in ends]
    return min(found, key=lambda cuts: largest(times_s, cuts))


def equal_depth(times_s: list[float], num_stages: int) -> tuple[int, ...]:
    return partition.by_depth(len(times_s), num_stages).cuts


def repaired(cuts: list[int], num_layers: int, num_stages: int) -> list[int]:
    """So that every stage has a layer, whatever a greedy rule gave."""
    cuts = (cuts + [num_layers] * num_stages)[: num_stages - 1]
    for s in range(num_stages - 1):
        cuts[s] = min(max(cuts[s], s + 1, cuts[s - 1] + 1 if s else 1), num_layers - (num_stages - 1 - s))
    return cuts


def greedy_until_the_mean(times_s: list[float], num_stages: int) -> list[int]:
    mean, cuts, load = sum(times_s) / num_stages, [], 0.0
    for i, t in enumerate(times_s):
        load += t
        if load >= mean:
            cuts.append(i + 1)
            load = 0.0
    return repaired(cuts, len(times_s), num_stages)


def greedy_below_the_mean(times_s: list[float], num_stages: int) -> list[int]:
    mean, cuts, load = sum(times_s) / num_stages, [], 0.0
    for i, t in enumerate(times_s):
        if load + t > mean and i:
            cuts.append(i)
            load = 0.0
        load += t
    return repaired(cuts, len(times_s), num_stages)


def nearest_to_the_quantiles(times_s: list[float], num_stages: int) -> list[int]:
    sums = [0.0, *accumulate(times_s)]
    wanted = [sums[-1] * s / num_stages for s in range(1, num_stages)]
    cuts = [min(range(len(sums)), key=lambda i: abs(sums[i] - w)) for w in wanted]
    return repaired(cuts, len(times_s), num_stages)


def slowest_halved_again_and_again(times_s: list[float], num_stages: int) -> list[int]:
    cuts: list[int] = []
    while len(cuts) < num_stages - 1:
        able = [i for i in range(1, len(times_s)) if i not in cuts]
        cuts = sorted([*cuts, min(able, key=lambda i: largest(times_s, sorted([*cuts, i])))])
    return cuts


def smallest_sum_of_squares(times_s: list[float], num_stages: int) -> list[int]:
    """The variance is another goal."""
    n, best = len(times_s), {0: (0.0, [])}
    for s in range(num_stages):
        new: dict[int, tuple[float, list[int]]] = {}
        for j in range(s + 1, n + 1):
            new[j] = min(
                (squares + sum(times_s[i:j]) ** 2, [*cuts, i] if s else [])
                for i, (squares, cuts) in best.items()
                if i < j
            )
        best = new
    return best[n][1]


def ends_of_stages(times_s: list[float], num_stages: int) -> list[int]:
    return [*table(times_s, num_stages), len(times_s)]


def sizes_of_stages(times_s: list[float], num_stages: int) -> list[int]:
    return [b - a for a, b in pairwise([0, *table(times_s, num_stages), len(times_s)])][:-1]


def floats(times_s: list[float], num_stages: int) -> list[float]:
    return [float(cut) for cut in table(times_s, num_stages)]


def sorts(times_s: list[float], num_stages: int) -> tuple[int, ...]:
    cuts = table(times_s, num_stages)
    times_s.sort()
    return cuts


def pops(times_s: list[float], num_stages: int) -> tuple[int, ...]:
    cuts = table(times_s, num_stages)
    times_s.pop()
    return cuts


def returns_nothing(times_s: list[float], num_stages: int) -> None:
    table(times_s, num_stages)


def fails_on_one_stage(times_s: list[float], num_stages: int) -> tuple[int, ...]:
    return (min(table(times_s, num_stages)), *table(times_s, num_stages)[1:])


def library_cuts(times_s: list[float], num_stages: int) -> tuple[int, ...]:
    return partition.by_time(times_s, num_stages).cuts


WRONG_CUTS: list[tuple[Any, list[str]]] = [
    (brute_force, [STEPS]),
    (recursion_without_memory, [STEPS]),
    (equal_depth, [SLOWEST]),
    (greedy_until_the_mean, [SLOWEST]),
    (greedy_below_the_mean, [SLOWEST]),
    (nearest_to_the_quantiles, [SLOWEST]),
    (slowest_halved_again_and_again, [SLOWEST]),
    (smallest_sum_of_squares, [SLOWEST]),
    (ends_of_stages, [LAYERS]),
    (sizes_of_stages, [LAYERS]),
    (floats, [LAYERS]),
    (sorts, [INPUT]),
    (pops, [INPUT]),
    (returns_nothing, [LAYERS]),
    (fails_on_one_stage, [ENDS]),
    (library_cuts, [OWN]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_CUTS, ids=[name(solution) for solution, _ in WRONG_CUTS])
def test_wrong_cuts_fail_for_their_own_reason(solution: Any, reasons: list[str]) -> None:
    check_fails_at(check_optimal_cut, solution, reasons)


def test_a_greedy_cut_is_told_what_would_do() -> None:
    (line,) = [line for line in check_optimal_cut(greedy_until_the_mean).lines if line.outcome == "failed"]
    assert line.case == "4, 5, 1, 1, 1; 2 stages"
    assert line.expected == "a slowest stage of 8, as with [1]"
    assert line.seen == "9, with [2]"


def test_brute_force_is_stopped_before_the_longest_chain() -> None:
    (line,) = [line for line in check_optimal_cut(brute_force).lines if line.outcome == "failed"]
    assert line.case == "40 layers; 6 stages"
    assert line.seen == "stopped after 970,000 steps"
    assert "too many cuts" in line.hint


# --- the best number of micro-batches ---------------------------------------------------------------------------------

DIVIDES = "m divides the batch"
FREE = "m is the fastest where messages and launches are free"
LAUNCH = "m is the fastest where launches cost"
SLOW = "m is the fastest on a slow link"
LATENCY = "m is the fastest on a link of high latency"
ALONE = "m is the fastest on one rank"
ANYWHERE = "m is the fastest anywhere"


def divisors(number: int) -> list[int]:
    return [m for m in range(1, number + 1) if number % m == 0]


def by_simulation(p: int, batch: int, forward_s: float, launch_s: float, link: Link, size: int) -> int:
    def step_s(m: int) -> float:
        part = batch // m
        stage = LayerCost("stage", part * forward_s, 2 * part * forward_s, output_bytes=part * size)
        return simulate(schedule.build("gpipe", p, m), [stage] * p, link, launch_s=launch_s).makespan_s

    return min(divisors(batch), key=step_s)


def by_formula(
    p: int,
    batch: int,
    forward_s: float,
    launch_s: float,
    link: Link,
    size: int,
    backward: float = 2,
    able: Callable[[int], list[int]] = divisors,
    overlap: bool = True,
    first: bool = True,
) -> int:
    def step_s(m: int) -> float:
        part = batch / m
        f, b = part * forward_s + launch_s, backward * part * forward_s + launch_s
        c = link.time_s(1, part * size) if p > 1 else 0.0
        if not overlap:
            return (m + p - 1) * (f + b + 2 * c)
        return (p - 1) * (f + b + 2 * c) + f + b + (m - 1) * (max(f, c) + max(b, c))

    return min(able(batch) if first else able(batch)[::-1], key=step_s)


def of_equals_the_largest(*arguments: Any) -> int:
    return by_formula(*arguments, first=False)


@pytest.mark.parametrize("solution", [by_simulation, by_formula, of_equals_the_largest], ids=name)
def test_right_numbers_of_microbatches_pass(solution: Any) -> None:
    report = check_fastest_num_microbatches(solution)
    assert report.passed, str(report)
    assert str(report).startswith("fastest_num_microbatches: 8 of 8 checks passed")


def as_many_as_can_be(p: int, batch: int, *_: Any) -> int:
    return batch


def as_few_as_can_be(*_: Any) -> int:
    return 1


def without_launches(p: int, batch: int, forward_s: float, launch_s: float, link: Link, size: int) -> int:
    return by_formula(p, batch, forward_s, 0.0, link, size)


def without_messages(p: int, batch: int, forward_s: float, launch_s: float, link: Link, size: int) -> int:
    return by_formula(p, batch, forward_s, launch_s, Link(0.0, math.inf), size)


def without_latency(p: int, batch: int, forward_s: float, launch_s: float, link: Link, size: int) -> int:
    return by_formula(p, batch, forward_s, launch_s, Link(0.0, link.bandwidth_bytes_s), size)


def without_bytes(p: int, batch: int, forward_s: float, launch_s: float, link: Link, size: int) -> int:
    return by_formula(p, batch, forward_s, launch_s, link, 0)


def without_the_backward(*arguments: Any) -> int:
    return by_formula(*arguments, backward=0)


def messages_that_stop_the_sender(*arguments: Any) -> int:
    return by_formula(*arguments, overlap=False)


def powers_of_two(*arguments: Any) -> int:
    return by_formula(*arguments, able=lambda batch: [m for m in divisors(batch) if m & (m - 1) == 0])


def four_times_the_ranks(p: int, batch: int, *_: Any) -> int:
    """The rule of thumb."""
    return min(divisors(batch), key=lambda m: abs(m - 4 * p))


def any_number(p: int, batch: int, *_: Any) -> int:
    return min(8, batch)


def a_float(*arguments: Any) -> float:
    return float(by_formula(*arguments))


def the_times(p: int, batch: int, *_: Any) -> dict[int, float]:
    return dict.fromkeys(divisors(batch), 0.0)


def counts_for_ever(p: int, batch: int, *_: Any) -> int:
    m = 1
    while m != batch + 0.5:
        m += 1
    return m


WRONG_NUMBERS: list[tuple[Any, list[str]]] = [
    (as_many_as_can_be, [LAUNCH, SLOW, LATENCY, ALONE, ANYWHERE]),
    (as_few_as_can_be, [FREE, LAUNCH, SLOW, LATENCY, ANYWHERE]),
    (without_launches, [LAUNCH, SLOW, ANYWHERE]),
    (without_messages, [SLOW, LATENCY, ANYWHERE]),
    (without_latency, [LATENCY, ANYWHERE]),
    (without_bytes, [SLOW, ANYWHERE]),
    (without_the_backward, [LAUNCH, LATENCY, ANYWHERE]),
    (messages_that_stop_the_sender, [SLOW, LATENCY, ANYWHERE]),
    (powers_of_two, [FREE, LAUNCH, SLOW, LATENCY, ANYWHERE]),
    (four_times_the_ranks, [FREE, LAUNCH, SLOW, LATENCY, ALONE, ANYWHERE]),
    (any_number, [DIVIDES]),
    (a_float, [DIVIDES]),
    (the_times, [DIVIDES]),
    (counts_for_ever, [ENDS]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_NUMBERS, ids=[name(solution) for solution, _ in WRONG_NUMBERS])
def test_wrong_numbers_of_microbatches_fail_for_their_own_reason(solution: Any, reasons: list[str]) -> None:
    check_fails_at(check_fastest_num_microbatches, solution, reasons)


def test_a_slower_number_is_told_with_its_time() -> None:
    (line, *_) = [line for line in check_fastest_num_microbatches(as_few_as_can_be).lines if line.outcome == "failed"]
    assert line.expected == "12, with a step of 45 ms"
    assert line.seen == "1, with 144 ms"
    assert "num_ranks=4, batch_size=12" in line.case


# --- all of them ------------------------------------------------------------------------------------------------------

CHECKS = [check_one_f_one_b, check_optimal_cut, check_fastest_num_microbatches]


@pytest.mark.parametrize("check", CHECKS)
def test_a_stub_is_no_failure(check: Callable[[Any], Report]) -> None:
    check_stub(check)


def test_a_generating_stub_is_no_failure() -> None:
    assert not check_one_f_one_b(generating_stub).is_written


def test_what_comes_after_a_failure_is_not_checked() -> None:
    outcomes = {line.name: line.outcome for line in check_one_f_one_b(naive).lines}
    assert outcomes[LOSS] == "passed", "a slow order trains as well"
    outcomes = {line.name: line.outcome for line in check_one_f_one_b(backward_first).lines}
    assert outcomes[LENGTH] == outcomes[IN_FLIGHT] == outcomes[LOSS] == "not checked"
    outcomes = {line.name: line.outcome for line in check_optimal_cut(floats).lines}
    assert outcomes[SLOWEST] == "not checked"
    outcomes = {line.name: line.outcome for line in check_fastest_num_microbatches(any_number).lines}
    assert outcomes[FREE] == "not checked"


@pytest.mark.parametrize("call", [lambda: 1 / 0, lambda: next(x for x in iter(int, 1) if x)])
def test_the_trace_is_put_back(call: Callable[[], object]) -> None:
    before = sys.gettrace()
    tried = attempt("a case", call, 1_000)
    assert isinstance(tried.error, ZeroDivisionError | TooManySteps)
    assert sys.gettrace() is before


def test_a_function_that_catches_everything_is_stopped_too() -> None:
    def stubborn() -> int:
        try:
            while True:
                pass
        except BaseException:
            return 7

    assert isinstance(attempt("a case", stubborn, 1_000).error, TooManySteps)


def test_prints_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def talkative(times_s: list[float], num_stages: int) -> tuple[int, ...]:
        print("here")
        return table(times_s, num_stages)

    assert check_optimal_cut(talkative).passed
    assert capsys.readouterr().out == ""


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "def one_f_one_b(rank, num_ranks, num_microbatches):\n"
        "    return [f'{rank}{kind}{j}' for kind in 'FB' for j in range(num_microbatches)]\n"
        "def optimal_cut(times_s, num_stages):\n    return range(1, num_stages)\n"
        "def fastest_num_microbatches(*_):\n    return 1\n"
    )
    check_command(code, tmp_path, capsys)
