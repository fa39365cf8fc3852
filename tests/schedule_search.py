"""The shortest schedule there is, found by trying everything, for sizes where that can be done.

The search knows nothing of orders. In every unit of time each rank goes on with what it has begun, begins something
that it can, or does nothing. All states that can be reached in 1, 2, 3, ... units are found level by level, and the
first level with the end in it is the shortest makespan. A forward takes 1 unit, a backward 2, each of its parts 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

# For every micro-batch: the units done of its way through the stages and back, and a bit for each stage whose weight
# gradients are done. Micro-batches are alike, so a state is sorted.
State = tuple[tuple[int, int], ...]
Choice = tuple[int, int, int]  # micro-batch, units, weight gradients


def shortest(
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 1,
    is_split: bool = False,
    limits: Sequence[int] | None = None,
) -> int | None:
    """Units of the shortest schedule; None where there is none.

    Args:
        num_chunks: stages of a rank: rank, rank + p, ...
        is_split: the backward is in two parts, and weight gradients can be put off.
        limits: how many micro-batches each rank can hold at once, counted for each of its stages; None: all.
    """
    search = _Search(num_ranks, num_ranks * num_chunks, is_split, limits)
    level: set[State] = {((0, 0),) * num_microbatches}
    end = ((len(search.way), 2**search.num_stages - 1 if is_split else 0),) * num_microbatches
    seen, time = set(level), 0
    while level and end not in level:
        level = {after for state in level for after in search.after(state)} - seen
        seen |= level
        time += 1
    return time if level else None


class _Search:
    def __init__(self, num_ranks: int, num_stages: int, is_split: bool, limits: Sequence[int] | None) -> None:
        self.num_ranks, self.num_stages, self.is_split, self.limits = num_ranks, num_stages, is_split, limits
        self.length = 1 if is_split else 2  # of what the stage before waits for
        back = [stage for stage in reversed(range(num_stages)) for _ in range(self.length)]
        self.way = [*range(num_stages), *back]

    def after(self, state: State) -> Iterator[State]:
        for choices in product(*(self.choices(state, rank) for rank in range(self.num_ranks))):
            now = list(state)
            for j, units, weights in filter(None, choices):
                now[j] = now[j][0] + units, now[j][1] | weights
            yield tuple(sorted(now))

    def choices(self, state: State, rank: int) -> list[Choice | None]:
        """What a rank can do in the next unit."""
        found: list[Choice | None] = [None]
        for j, (done, weights) in enumerate(state):
            if done < len(self.way) and self.way[done] % self.num_ranks == rank:
                if done > self.num_stages and (done - self.num_stages) % self.length:
                    return [(j, 1, 0)]  # in the middle of a backward
                if done >= self.num_stages or self.limits is None or self.held(state, rank) < self.limits[rank]:
                    found.append((j, 1, 0))
            if self.is_split:
                found += [
                    (j, 0, 1 << stage)
                    for stage in range(rank, self.num_stages, self.num_ranks)
                    if done >= self.is_back(stage) and not weights >> stage & 1
                ]
        return found

    def held(self, state: State, rank: int) -> int:
        return sum(
            stage < done and not (weights >> stage & 1 if self.is_split else done >= self.is_back(stage))
            for done, weights in state
            for stage in range(rank, self.num_stages, self.num_ranks)
        )

    def is_back(self, stage: int) -> int:
        """Units after which the gradient of a stage's input is there."""
        return self.num_stages + self.length * (self.num_stages - stage)
