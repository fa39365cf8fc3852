"""The check of 1F1B: which order a learner's function gives, by its length and by the micro-batches in flight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from mplab.errors import MplabError
from mplab.homework.limited import ENDS, OWN, Attempt, attempt, borrowed, error, is_written, until_hopeless
from mplab.homework.report import Complaint, Report, check_all
from mplab.models import cross_entropy
from mplab.parallel import PipelineParallel, Serial
from mplab.plan import schedule
from mplab.plan.schedule import Action, Schedule
from mplab.world.rank import Rank
from mplab.world.world import World

MAX_STEPS = 20_000
OrderSolution = Callable[[int, int, int], Iterable[Action | str]]
ANSWERS = {
    order.__code__: order.__name__
    for order in (
        schedule.naive,
        schedule.gpipe,
        schedule.one_f_one_b,
        schedule.interleaved,
        schedule.zero_bubble,
    )
}


@dataclass(frozen=True)
class _Order:
    """What a solution gave for one size of pipeline."""

    num_ranks: int
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        return _size(self.num_ranks, self.num_microbatches)

    @property
    def schedule(self) -> Schedule:
        return Schedule("this order", self.ranks)


def check_one_f_one_b(solution: OrderSolution) -> Report:
    """Check `solution(rank, num_ranks, num_microbatches)`: the 1F1B order of one rank.

    It is called for 1 to 5 ranks and 1 to 8 micro-batches. The length of the schedule alone would not tell 1F1B from
    GPipe; the micro-batches in flight do. At last a small model is trained in that order.

    Args:
        solution: yields or returns the rank's actions in order, as `Action(rank, "F", 0)` or its text "0F0"; stage r is
            on rank r.

    Returns:
        A report; nothing that the solution does is raised.
    """
    sizes = [(p, m) for p in range(1, 6) for m in range(1, 9)]

    def call(num_ranks: int, num_microbatches: int) -> list[list[Any]]:
        # Twice as many as there are: more need not be seen.
        return [
            list(islice(solution(rank, num_ranks, num_microbatches), 4 * num_microbatches)) for rank in range(num_ranks)
        ]

    tried = until_hopeless(attempt(_size(p, m), partial(call, p, m), MAX_STEPS, ANSWERS) for p, m in sizes)
    if not is_written(tried):
        return Report("one_f_one_b", (), is_written=False)
    ends = check_all(ENDS, tried, error("look for a loop that doesn't end"), "1 to 5 ranks, 1 to 8 micro-batches")
    own = check_all(OWN, tried, borrowed)

    given = [_given(p, m, t.result) for (p, m), t in zip(sizes, tried, strict=True)] if ends.outcome == "passed" else []
    complete = check_all("each micro-batch once forward, once backward", given, _incomplete)
    orders = [order for order in given if isinstance(order, _Order)] if complete.outcome == "passed" else []
    waits = check_all("no rank waits for ever", orders, _stuck)
    able = orders if waits.outcome == "passed" else []
    lines = [
        ends,
        own,
        complete,
        waits,
        check_all("length of the schedule", able, _length, "3(m + p - 1) units; 18 with p = 3, m = 4"),
        check_all("micro-batches in flight", able, _in_flight, "min(p - rank, m); 3, 2, 1 with p = 3, m = 4"),
        check_all("the loss is that of serial training", [o for o in able if str(o) == _size(3, 4)], _trains),
    ]
    return Report("one_f_one_b", tuple(lines))


def _size(num_ranks: int, num_microbatches: int) -> str:
    return f"{num_ranks} rank{'s' * (num_ranks > 1)}, {num_microbatches} micro-batch{'es' * (num_microbatches > 1)}"


def _given(num_ranks: int, num_microbatches: int, lists: list[list[Any]]) -> _Order | Attempt:
    try:
        ranks = tuple(tuple(map(_action, items)) for items in lists)
    except MplabError as problem:
        return Attempt(_size(num_ranks, num_microbatches), error=problem)
    return _Order(num_ranks, num_microbatches, ranks)


def _action(item: object) -> Action:
    if isinstance(item, str):
        return Action.parse(item)
    if isinstance(item, Action):
        return item
    raise MplabError(f'{item!r} is no action: yield Action(rank, "F", j), or its text, "0F0" with rank 0 and j 0')


def _incomplete(order: _Order | Attempt) -> Complaint | None:
    if isinstance(order, Attempt):
        return Complaint("actions", str(order.error), "an action says its stage, F or B, and its micro-batch")
    for rank, actions in enumerate(order.ranks):
        want = [Action(rank, kind, j) for kind in ("F", "B") for j in range(order.num_microbatches)]
        missing = [a for a in want if a not in actions]
        strange = [a for i, a in enumerate(actions) if a not in want or a in actions[:i]]
        if missing or strange:
            seen = [f"{_listed(actions)} on rank {rank}"]
            seen += [f"missing: {_listed(missing)}"] if missing else []
            seen += [f"too many: {_listed(strange)}"] if strange else []
            hint = "count the forwards before the first backward, the pairs of both, and the backwards that are left"
            return Complaint(f"one F and one B of stage {rank} for each micro-batch", "\n".join(seen), hint)
    return None


def _listed(actions: Iterable[Action]) -> str:
    return " ".join(map(str, actions)) or "nothing"


def _stuck(order: _Order) -> Complaint | None:
    try:
        _ = order.schedule
    except MplabError as problem:
        hint = "a backward needs its own forward and the backward of the stage after; a forward, that of the one before"
        return Complaint("an order that can finish", str(problem), hint)
    return None


def _length(order: _Order) -> Complaint | None:
    p, m = order.num_ranks, order.num_microbatches
    want, got = 3 * (m + p - 1), round(order.schedule.makespan())
    if got == want:
        return None
    hint = "a forward takes 1 unit and a backward 2; ranks before the last go on with forwards while they would wait"
    return Complaint(f"{want} units", f"{got} units\n{order.schedule.draw()}", hint)


def _in_flight(order: _Order) -> Complaint | None:
    p, m = order.num_ranks, order.num_microbatches
    want, got = tuple(min(p - rank, m) for rank in range(p)), order.schedule.in_flight()
    if got == want:
        return None
    if any(g > w for g, w in zip(got, want, strict=True)):
        hint = "as soon as rank r holds p - r micro-batches, it does a backward before its next forward"
    else:
        hint = "rank r begins with p - 1 - r forwards (or m, where there are fewer), then one forward, one backward"
    seen = f"{_ranks(got)}\n{order.schedule.draw()}"
    return Complaint(f"{_ranks(want)}: min(p - rank, m)", seen, hint)


def _ranks(counts: Sequence[int]) -> str:
    return f"{', '.join(map(str, counts))} on ranks 0 to {len(counts) - 1}" if len(counts) > 1 else f"{counts[0]}"


def _trains(order: _Order) -> Complaint | None:
    """Three steps of a small model, in this order and serially."""
    with torch.device("meta"):  # torch's own initialisation would draw from the learner's generator
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(order.num_ranks)))
    model.to_empty(device="cpu")
    numbers = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=numbers)
    batch = torch.randn(8, 4, generator=numbers), torch.randint(4, (8,), generator=numbers)
    cuts = tuple(range(1, order.num_ranks))

    def main(rank: Rank) -> list[float]:
        pipeline = PipelineParallel(model, cuts, rank.comm, order.schedule, order.num_microbatches, cross_entropy, _sgd)
        return [pipeline.step(batch) for _ in range(3)]

    try:
        got = World(order.num_ranks, device="cpu", timeout_s=5.0).run(main)[0]
    except MplabError as problem:
        return Complaint("three steps", str(problem), "run it with PipelineParallel and read the traceback")
    serial = Serial(model, _sgd(model.parameters()), num_microbatches=order.num_microbatches)
    want = [serial.step(batch) for _ in range(3)]
    if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(got, want, strict=True)):
        return None
    return Complaint(f"losses {want}", f"losses {got}", "is every micro-batch there once, and on its own rank?")


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
