"""The check of the best cuts: as good as `by_time`'s, and found without trying them all."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

from mplab.errors import MplabError
from mplab.homework.limited import ENDS, OWN, ROUNDING, Attempt, TooManySteps, attempt, borrowed, error, is_written
from mplab.homework.report import Complaint, Report, check_all
from mplab.plan.balance import best_cuts
from mplab.plan.partition import by_time, check_cuts

CutSolution = Callable[[list[float], int], Sequence[int]]
CHAINS: tuple[tuple[list[float], int], ...] = (
    ([3, 1, 2], 1),
    ([1, 2, 3], 2),
    ([2, 3, 4], 3),
    ([1, 1, 1, 1, 1, 6], 2),  # as many layers in each stage: 8, where 6 will do
    ([4, 5, 1, 1, 1], 2),  # cut as soon as half is reached: 9, where 8 will do
    ([3, 3, 3, 1, 4], 3),  # never more than a third in a stage but the last: 8, where 6 will do
    ([1, 1, 1, 9, 1, 1, 1], 3),
    ([5, 1, 1, 1, 1, 1, 1, 5], 4),
    ([0, 0, 7, 0, 0, 0], 4),
)
RANDOM = [(5, 2), (7, 3), (9, 4), (12, 5)] * 5
LONG = [(40, 6), (120, 8)]
SLOW = "there are too many cuts to try them all; the best cut of the first j layers contains a best one of the first i"


def check_optimal_cut(solution: CutSolution) -> Report:
    """Check `solution(times_s, num_stages)`: the cuts that make the slowest stage as fast as can be.

    It is called on small chains, on random ones, and on long ones of n layers and p stages, where 100 n² p steps are
    allowed: some fifty times what dynamic programming needs, and too few to try all cuts.

    Args:
        solution: called with a list of times, one a layer, and the number of stages p; returns or yields the first
            layer of each stage but the first, p - 1 whole numbers. Any optimum passes.

    Returns:
        A report; nothing that the solution does is raised.
    """
    numbers = random.Random(3)
    short = [_Chain(times, p) for times, p in CHAINS]
    short += [_Chain([float(numbers.randint(1, 20)) for _ in range(n)], p) for n, p in RANDOM]
    long = [_Chain([numbers.uniform(1e-3, 5e-3) for _ in range(n)], p) for n, p in LONG]
    for chain in short + long:
        if chain in long and any(other.tried.error for other in short + long):
            break  # what failed on a small chain might take all memory on a long one
        limit = 10_000 + 100 * len(chain.times) ** 2 * chain.num_stages
        call = partial(_listed, solution, chain)
        chain.tried = attempt(str(chain), call, limit, {best_cuts.__code__: "by_time"})
        if isinstance(chain.tried.error, TooManySteps):
            break
    called = [chain.tried for chain in short + long if chain.tried.case]
    if not is_written(called):
        return Report("optimal_cut", (), is_written=False)
    done = [chain for chain in short + long if chain.tried.case and chain.tried.error is None]
    good = check_all("every stage has a layer", done, _bad_cuts, "p - 1 whole numbers, each above the one before")
    lines = [
        check_all(ENDS, [chain.tried for chain in short], error(SLOW)),
        check_all(OWN, called, borrowed),
        good,
        check_all("the slowest stage is as fast as can be", done if good.outcome == "passed" else [], _too_slow),
        check_all("the list of times is left alone", done, _changed),
        check_all("steps on a long chain", [c.tried for c in long if c.tried in called], error(SLOW), "O(n² p)"),
    ]
    return Report("optimal_cut", tuple(lines))


def _listed(solution: CutSolution, chain: _Chain) -> Any:
    """What is yielded as a list; more than one too many need not be seen."""
    found = solution(chain.given, chain.num_stages)
    return list(islice(found, chain.num_stages)) if isinstance(found, Iterator) else found


class _Chain:
    """One call; `given` is the list that the solution gets."""

    def __init__(self, times: Sequence[float], num_stages: int) -> None:
        self.times, self.num_stages, self.given = tuple(times), num_stages, list(times)
        self.tried = Attempt("")

    def __str__(self) -> str:
        what = ", ".join(f"{t:g}" for t in self.times) if len(self.times) < 40 else f"{len(self.times)} layers"
        return f"{what}; {self.num_stages} stage{'s' * (self.num_stages > 1)}"

    @property
    def cuts(self) -> Any:
        return self.tried.result

    @property
    def largest(self) -> float:
        """The slowest stage with these cuts."""
        return max(math.fsum(self.times[a:b]) for a, b in pairwise([0, *self.cuts, len(self.times)]))


def _bad_cuts(chain: _Chain) -> Complaint | None:
    try:
        check_cuts(chain.cuts, [f"{t:g} s" for t in chain.times], chain.num_stages)
    except MplabError as problem:
        hint = "return the first layer of each stage but the first: (2,) is layers 0 and 1, then all from 2 on"
        return Complaint(f"{chain.num_stages - 1} cuts", str(problem).partition(". ")[0], hint)
    return None


def _too_slow(chain: _Chain) -> Complaint | None:
    best = by_time(chain.times, chain.num_stages)
    if chain.largest <= max(best.loads) * (1 + ROUNDING):
        return None
    hint = "try every start of the last stage: the layers before it are cut best on their own"
    seen = f"{chain.largest:g}, with {list(chain.cuts)}"
    return Complaint(f"a slowest stage of {max(best.loads):g}, as with {list(best.cuts)}", seen, hint)


def _changed(chain: _Chain) -> Complaint | None:
    hint = "work on a copy: times = list(times_s)"
    return None if chain.given == list(chain.times) else Complaint("times_s as it was", str(chain.given), hint)
