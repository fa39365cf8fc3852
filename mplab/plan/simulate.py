"""What a schedule should take: its actions played out on ranks, cores and links, and the memory that they need.

Nothing is drawn at random: equal arguments give equal timelines, to the last bit. With a core a rank and free messages
it is `Schedule.ends`, event by event.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost
from mplab.plan.schedule import Action, Schedule
from mplab.trace.event import Event
from mplab.trace.timeline import PREDICTED_NOTE, Timeline

FREE = Link(0.0, math.inf)


def simulate(
    schedule: Schedule,
    costs: Sequence[LayerCost],
    link: Link | None = None,
    cores: int | None = None,
    launch_s: float = 0.0,
    title: str | None = None,
) -> Timeline:
    """One step as it should go, as a timeline like a measured one.

    A rank computes one action at a time, in its order. An output leaves as soon as it is computed, and the rank goes on
    meanwhile. A rank sends one message and receives one at a time, first come, first served, as an emulated link does;
    stages of one rank need no message. Where k ranks compute on c < k cores, each of them runs at c/k of its speed.

    From three ranks on, where two can send to one, a step may get shorter when a stage or the link gets slower: another
    message is then the first.

    Args:
        schedule: the order of the actions.
        costs: of each stage, on one micro-batch.
        link: between any two ranks; None: messages take no time.
        cores: that the ranks share; None: one for each.
        launch_s: seconds of Python and dispatch before every action; they are part of its event, and occupy its core.
        title: of the timeline.

    Returns:
        Compute events named as `Schedule.span_name` names them, and "update" at the end of each rank whose stages have
        an `update_s`; messages "send" with their bytes on the sender; waits "recv" on ranks that are idle until an
        input arrives.

    Raises:
        MplabError: not one cost a stage, no cores, a launch time below 0.

    Reference:
        Kleinrock, "Time-shared systems: a theoretical treatment", JACM 14(2), 1967 (processor sharing).
    """
    _check_costs(schedule, costs)
    if cores is not None and (not isinstance(cores, int) or isinstance(cores, bool) or cores < 1):
        raise MplabError(f"cores={cores!r}: ranks share a whole number of cores, 1 or more; None is a core a rank")
    if not (isinstance(launch_s, int | float) and 0 <= launch_s < math.inf):
        raise MplabError(f"launch_s={launch_s!r}: a launch takes 0 seconds or more (20e-6 is 20 µs)")
    notes = [PREDICTED_NOTE]
    num_computing = sum(map(bool, schedule.ranks))
    if cores is not None and cores < num_computing:
        sharing = f"{num_computing} ranks share {cores} core{'s' * (cores > 1)}"
        notes.append(f"{sharing}: times are not speed-ups")
    if link is not None:
        notes.append(f"link: {link}")
    events = _Play(schedule, costs, link or FREE, cores or schedule.num_ranks, launch_s).events()
    return Timeline(events, schedule.num_ranks, tuple(notes), title)


class _Piece(NamedTuple):
    """What a rank computes in one go: an action, or the update."""

    name: str
    work_s: float
    action: Action | None = None
    reader: Action | None = None
    dst: int | None = None  # the rank that its output is sent to
    waits: bool = False  # for a message


class _Play:
    """The event loop. Its events are ends of pieces and arrivals of messages.

    All running ranks are equally fast, so one number is the progress of all: the *work* that a rank would have done had
    it run from the start. A piece ends when that number has grown by the piece's own work, however the speed changes in
    between. Work is `_work_then` + `_speed` * (time - `_then`). These change with the number of running ranks, so where
    there are cores enough they never do, and work is time, exactly.
    """

    def __init__(self, schedule: Schedule, costs: Sequence[LayerCost], link: Link, cores: int, launch_s: float) -> None:
        self._costs, self._link, self._cores = costs, link, cores
        self._ranks = [_pieces(schedule, costs, rank, launch_s) for rank in range(schedule.num_ranks)]
        self._rank_of = schedule.rank_of
        num_ranks = schedule.num_ranks
        self._places, self._is_running = [0] * num_ranks, [False] * num_ranks
        self._since, self._sending_until, self._receiving_until = ([0.0] * num_ranks for _ in range(3))
        self._now = self._work = self._then = self._work_then = 0.0
        self._speed = 1.0
        self._ending: list[tuple[float, int]] = []  # heap of (work, rank)
        self._arriving: list[tuple[float, Action]] = []  # heap of (time, the action that waits)
        self._arrived: set[Action] = set()
        self._events: list[Event] = []

    def events(self) -> list[Event]:
        """Play it to the end."""
        for rank in range(len(self._ranks)):
            self._begin(rank)
        self._set_speed()
        while self._ending or self._arriving:
            end, arrival = math.inf, math.inf
            if self._ending:
                end = self._then + (self._ending[0][0] - self._work_then) / self._speed
            if self._arriving:
                arrival = self._arriving[0][0]
            self._now = max(self._now, min(end, arrival))  # rounding must not turn time back
            if end <= arrival:
                self._work, rank = heappop(self._ending)
                self._end(rank)
            else:
                self._work = self._work_then + (self._now - self._then) * self._speed
                action = heappop(self._arriving)[1]
                self._arrived.add(action)
                rank = self._rank_of[action.stage]
            self._begin(rank)
            self._set_speed()
        return self._events

    def _begin(self, rank: int) -> None:
        """Start the rank's next piece, if there is one and its input is there."""
        place, pieces = self._places[rank], self._ranks[rank]
        if self._is_running[rank] or place == len(pieces):
            return
        piece = pieces[place]
        if piece.waits and piece.action not in self._arrived:
            return
        if self._now > self._since[rank]:
            assert piece.action is not None
            self._events.append(Event(rank, "wait", "recv", self._since[rank], self._now, 0, piece.action.microbatch))
        self._since[rank], self._is_running[rank] = self._now, True
        heappush(self._ending, (self._work + piece.work_s, rank))

    def _end(self, rank: int) -> None:
        piece = self._ranks[rank][self._places[rank]]
        microbatch = None if piece.action is None else piece.action.microbatch
        self._events.append(Event(rank, "compute", piece.name, self._since[rank], self._now, 0, microbatch))
        self._places[rank] += 1
        self._since[rank], self._is_running[rank] = self._now, False
        if piece.action is not None and piece.reader is not None and piece.dst is not None:
            self._send(rank, piece.dst, piece.action, piece.reader)

    def _send(self, src: int, dst: int, action: Action, reader: Action) -> None:
        # Both an activation and its gradient are as large as the output of the earlier stage.
        size_bytes = round(self._costs[min(action.stage, reader.stage)].output_bytes)
        start = max(self._now, self._sending_until[src], self._receiving_until[dst])
        arrival = start + self._link.time_s(1, size_bytes)
        self._sending_until[src] = self._receiving_until[dst] = arrival
        self._events.append(Event(src, "message", "send", start, arrival, size_bytes, action.microbatch))
        heappush(self._arriving, (arrival, reader))

    def _set_speed(self) -> None:
        speed = min(1.0, self._cores / max(1, len(self._ending)))
        if speed != self._speed:
            self._then, self._work_then, self._speed = self._now, self._work, speed


def _pieces(schedule: Schedule, costs: Sequence[LayerCost], rank: int, launch_s: float) -> list[_Piece]:
    kinds = {(a.stage, a.kind): a for a in schedule.ranks[rank]}
    names = {key: schedule.span_name(action) for key, action in kinds.items()}
    works = {key: launch_s + _seconds(costs[action.stage], action) for key, action in kinds.items()}
    pieces = []
    for action in schedule.ranks[rank]:
        key = action.stage, action.kind
        reader = schedule.reader(action)
        dst = None if reader is None else schedule.rank_of[reader.stage]
        waits = any(schedule.rank_of[other.stage] != rank for other in schedule.needs(action))
        pieces.append(_Piece(names[key], works[key], action, reader, None if dst == rank else dst, waits))
    update_s = sum(costs[stage].update_s for stage in schedule.stages(rank))
    return [*pieces, _Piece("update", update_s)] if update_s else pieces


def _seconds(cost: LayerCost, action: Action) -> float:
    return {
        "F": cost.forward_s,
        "B": cost.backward_s,
        "I": cost.input_gradient_s,
        "W": cost.weight_gradient_s,
    }[action.kind]


def memory_bytes(
    schedule: Schedule, costs: Sequence[LayerCost], recompute: bool = False, state_copies: float = 2
) -> tuple[float, ...]:
    """What each rank must hold at its peak: parameters, their gradients, the optimizer's state, and activations.

    What a framework and its kernels take besides is not in it, nor are messages and the batch.

    Args:
        schedule: the order of the actions.
        costs: of each stage, as without recomputation.
        recompute: see `activation_bytes`.
        state_copies: what the optimizer holds for a parameter, in parameters: AdamW 2, SGD with momentum 1, SGD 0.

    Raises:
        MplabError: not one cost a stage.
    """
    activations = activation_bytes(schedule, costs, recompute)
    parameters = [sum(costs[stage].parameter_bytes for stage in schedule.stages(r)) for r in range(schedule.num_ranks)]
    return tuple((2 + state_copies) * p + a for p, a in zip(parameters, activations, strict=True))


def activation_bytes(schedule: Schedule, costs: Sequence[LayerCost], recompute: bool = False) -> tuple[float, ...]:
    """The most that each rank holds of activations at once.

    A stage holds a micro-batch from its forward to the end of its backward, of both parts where it has two.

    Args:
        schedule: the order of the actions.
        costs: of each stage, as without recomputation.
        recompute: a stage holds its input alone until its backward begins, then all. The first stage's input is a part
            of the batch, which is there anyway, and counts nothing.

    Raises:
        MplabError: not one cost a stage.

    Reference:
        Chen et al., "Training deep nets with sublinear memory cost", arXiv:1604.06174, 2016 (recomputation).
    """
    _check_costs(schedule, costs)
    peaks = []
    for actions in schedule.ranks:
        held = peak = 0.0
        for stage, kind, _ in actions:
            whole = until_backward = costs[stage].activation_bytes
            if recompute:
                until_backward = costs[stage - 1].output_bytes if stage else 0
            if kind == "F":
                held += until_backward
            elif kind in ("B", "I"):
                held += whole - until_backward
            peak = max(peak, held)
            if kind in ("B", "W"):
                held -= whole
        peaks.append(peak)
    return tuple(peaks)


def _check_costs(schedule: Schedule, costs: Sequence[LayerCost]) -> None:
    if len(costs) != schedule.num_stages:
        raise MplabError(
            f"{len(costs)} costs for the {schedule.num_stages} stages of {schedule.name}: give one a stage, as "
            "`stage_costs(layers, cuts)` does"
        )
