"""In which order a pipeline computes: every rank's list of actions, made by a generator, checked and drawn.

A schedule is data. `validate` refuses one that cannot finish, `Schedule.draw` prints it, `mplab.plan.simulate` times it
and `mplab.parallel.PipelineParallel` executes it; nothing else decides the order. Messages are not in it: an output
leaves as soon as it is computed, and an input is waited for just before it is used. The orders that have names are in
`mplab.plan.orders`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from mplab.errors import MplabError
from mplab.plan.orders import KINDS as KINDS
from mplab.plan.orders import NAMES as NAMES
from mplab.plan.orders import ORDERS as ORDERS
from mplab.plan.orders import Action as Action
from mplab.plan.orders import Kind as Kind
from mplab.plan.orders import Order as Order
from mplab.plan.orders import gpipe as gpipe
from mplab.plan.orders import interleaved as interleaved
from mplab.plan.orders import naive as naive
from mplab.plan.orders import one_f_one_b as one_f_one_b
from mplab.plan.orders import zero_bubble as zero_bubble


@dataclass(frozen=True)
class Schedule:
    """What every rank computes, in order.

    Args:
        name: "1f1b".
        ranks: each rank's actions.

    Raises:
        MplabError: it is not one that can run (see `validate`).
    """

    name: str
    ranks: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        validate(self)

    @property
    def num_ranks(self) -> int:
        """How many ranks it is for."""
        return len(self.ranks)

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """The rank of every stage."""
        places = {action.stage: rank for rank, actions in enumerate(self.ranks) for action in actions}
        return tuple(places[stage] for stage in range(len(places)))

    @cached_property
    def actions(self) -> frozenset[Action]:
        """The actions of all ranks."""
        return frozenset(action for actions in self.ranks for action in actions)

    @property
    def num_stages(self) -> int:
        """Stages of all ranks."""
        return len(self.rank_of)

    @cached_property
    def num_microbatches(self) -> int:
        """Micro-batches of a step."""
        return 1 + max(action.microbatch for actions in self.ranks for action in actions)

    def stages(self, rank: int) -> tuple[int, ...]:
        """The stages of one rank, in order."""
        return tuple(stage for stage, place in enumerate(self.rank_of) if place == rank)

    def needs(self, action: Action) -> list[Action]:
        """What must be computed before, here or on another rank."""
        stage, kind, j = action
        if kind == "F":
            return [Action(stage - 1, "F", j)] if stage else []
        if kind == "W":
            return [Action(stage, "I", j)]
        # A backward in two parts hands its gradient on after the first.
        later = [Action(stage + 1, kind, j) for kind in ("B", "I")]
        return [Action(stage, "F", j), *(other for other in later if other in self.actions)]

    def reader(self, action: Action) -> Action | None:
        """The action of a neighbouring stage that takes what this one computes: an activation, or a gradient."""
        stage, kind, j = action
        takers = {"F": [(stage + 1, "F")], "W": []}.get(kind, [(stage - 1, "B"), (stage - 1, "I")])
        found = (Action(taker, how, j) for taker, how in takers)  # type: ignore[arg-type]
        return next((other for other in found if other in self.actions), None)

    def span_name(self, action: Action) -> str:
        """The action's name in a timeline: "forward", or "forward of chunk 1" on a rank with several stages."""
        stages = self.stages(self.rank_of[action.stage])
        name = NAMES[action.kind]
        return name if len(stages) == 1 else f"{name} of chunk {stages.index(action.stage)}"

    def ends(self, durations: Callable[[Action], float]) -> dict[Action, float]:
        """When every action ends, where messages take no time and every rank has a core of its own.

        Args:
            durations: of an action, in any unit.

        Raises:
            MplabError: some ranks wait for ever; says who waits for whom.
        """
        ends: dict[Action, float] = {}
        places: list[int] = [0] * self.num_ranks
        free_at: list[float] = [0] * self.num_ranks  # a whole 0, so that fractions stay fractions
        is_moving = True
        while is_moving:
            is_moving = False
            for rank, actions in enumerate(self.ranks):
                while places[rank] < len(actions):
                    action = actions[places[rank]]
                    before = self.needs(action)
                    if not all(other in ends for other in before):
                        break
                    start = max([free_at[rank], *(ends[other] for other in before)])
                    ends[action] = free_at[rank] = start + durations(action)
                    places[rank] += 1
                    is_moving = True
        if len(ends) < len(self.actions):
            raise MplabError(self._stuck(places, ends))
        return ends

    def _stuck(self, places: Sequence[int], ends: dict[Action, float]) -> str:
        lines = [f"{self.name}: this order can't finish:"]
        for rank, (actions, place) in enumerate(zip(self.ranks, places, strict=True)):
            if place < len(actions):
                action = actions[place]
                missing = next(other for other in self.needs(action) if other not in ends)
                where = self.rank_of[missing.stage]
                of = "itself, where it stands later" if where == rank else f"rank {where}"
                lines.append(f"  rank {rank} waits at {action}, its action {place}, for {missing} of {of}")
        return "\n".join(lines)

    def makespan(self, forward: float = 1, backward: float = 2) -> float:
        """From the first start to the last end, where all stages are equal and messages are free.

        Args:
            forward: time of one forward, in any unit.
            backward: of one backward; its two parts take half of it each.
        """
        return max(self.ends(lambda action: _unit(action, forward, backward)).values())

    def bubble(self, forward: float = 1, backward: float = 2) -> tuple[float, ...]:
        """The share of the makespan for which each rank is idle, where all stages are equal and messages are free."""
        span = self.makespan(forward, backward)
        return tuple(1 - sum(_unit(a, forward, backward) for a in actions) / span for actions in self.ranks)

    def in_flight(self) -> tuple[int, ...]:
        """The most micro-batches whose activations each rank holds at once; each of its stages counts.

        A micro-batch is held from its forward to the end of its backward, of both parts where it has two.
        """
        peaks = []
        for actions in self.ranks:
            held = peak = 0
            for action in actions:
                held += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
                peak = max(peak, held)
            peaks.append(peak)
        return tuple(peaks)

    def draw(self) -> str:
        """The table: a row a rank, a column a unit of time; a forward takes one, a backward two, its parts one each."""
        several = self.num_stages > self.num_ranks
        width = 1 + max(len(self._cell(action, several)) for actions in self.ranks for action in actions)
        lines = []
        for rank, actions in enumerate(self.ranks):
            line, ends = "", self.ends(_unit)
            for action in actions:
                length = int(_unit(action)) * width
                cell = self._cell(action, several).ljust(length - 1, "=" if action.kind == "B" else " ") + " "
                line = line.ljust(int(ends[action]) * width - length) + cell
            lines.append(f"rank {rank} | {line.rstrip()}")
        return "\n".join(lines)

    def _cell(self, action: Action, several: bool) -> str:
        return str(action) if several else f"{action.kind}{action.microbatch}"


def build(order: str | Order, num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of one of `ORDERS`, or of a generator of your own.

    Args:
        order: a name; or a function (rank, num_ranks, num_microbatches) -> the rank's actions.
        num_ranks: p, 1 or more.
        num_microbatches: m, 1 or more.

    Raises:
        MplabError: no such name, fewer than one rank or micro-batch, or an order that cannot run.
    """
    if not all(isinstance(n, int) and n >= 1 for n in (num_ranks, num_microbatches)):
        raise MplabError(
            f"a schedule of {num_microbatches!r} micro-batches on {num_ranks!r} ranks: give whole numbers, 1 or more"
        )
    if not (callable(order) or (isinstance(order, str) and order in ORDERS)):
        raise MplabError(
            f"schedule {order!r}: there are {', '.join(ORDERS)}; or give a function of (rank, num_ranks, "
            "num_microbatches) that yields the rank's actions"
        )
    name, generator = (order, ORDERS[order]) if isinstance(order, str) else (_name(order), order)
    ranks = []
    for rank in range(num_ranks):
        actions = generator(rank, num_ranks, num_microbatches)
        if not isinstance(actions, Iterable):
            raise MplabError(f"{name}: rank {rank} gets {actions!r}, not actions: yield them, or return a list of them")
        ranks.append(tuple(actions))
    return Schedule(name, tuple(ranks))


def validate(schedule: Schedule) -> None:
    """Refuse a schedule that cannot run.

    Raises:
        MplabError: actions that are missing, done twice, or of a stage that is on two ranks; a micro-batch that is used
            before it is there; ranks that wait for each other for ever. It says which.
    """
    for rank, actions in enumerate(schedule.ranks):
        for given in actions:
            if not isinstance(given, Action):
                raise MplabError(
                    f'{schedule.name}: rank {rank} does {given!r}, which is no action: write Action(0, "F", 0) or '
                    'Action.parse("0F0")'
                )
    counts = Counter(action for actions in schedule.ranks for action in actions)
    stages = {action.stage for action in counts}
    microbatches = {action.microbatch for action in counts}
    if not counts:
        raise MplabError(f"{schedule.name}: a schedule without actions")
    for what, numbers in (("stages", stages), ("micro-batches", microbatches)):
        if numbers != set(range(len(numbers))):
            raise MplabError(f"{schedule.name}: {what} {sorted(numbers)}, but they are numbered from 0 without a gap")
    for action, count in counts.items():
        if action.kind not in KINDS:
            raise MplabError(f"{schedule.name}: {action} is no action: its kind is one of {', '.join(KINDS)}")
        if count > 1:
            raise MplabError(f"{schedule.name}: {action} is done {count} times")
    for stage in sorted(stages):
        places = [r for r, actions in enumerate(schedule.ranks) if any(a.stage == stage for a in actions)]
        if len(places) > 1:
            raise MplabError(f"{schedule.name}: stage {stage} is on ranks {places}, but its weights are on one")
        for j in sorted(microbatches):
            kinds = "".join(kind for kind in KINDS if Action(stage, kind, j) in counts)
            if kinds not in ("FB", "FIW"):
                said = ", ".join(str(Action(stage, kind, j)) for kind in KINDS if kind in kinds) or "nothing"
                raise MplabError(
                    f"{schedule.name}: stage {stage} does {said} with micro-batch {j}; it needs one F, and one B or "
                    "one I and one W"
                )
    schedule.ends(_unit)


def _name(order: Order) -> str:
    return str(getattr(order, "__name__", getattr(getattr(order, "func", None), "__name__", "schedule")))


def _unit(action: Action, forward: float = 1, backward: float = 2) -> float:
    return {"F": forward, "B": backward, "I": backward / 2, "W": backward / 2}[action.kind]
