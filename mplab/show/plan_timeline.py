"""A step of a plan as it should go: the schedule played out, and in it the messages of every axis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from mplab.comm.mesh import Mesh
from mplab.plan.layer_cost import LayerCost
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.predict import MOST_PLAYED, Prediction, kind_times, stage_costs, stage_link
from mplab.plan.schedule import Schedule, build
from mplab.plan.share import partial_gradients, pipeline_calls, pipeline_sent
from mplab.plan.simulate import simulate
from mplab.plan.stages import Share, bounds, share_of
from mplab.plan.transformer import Transformer, layer_loads
from mplab.trace.event import Event
from mplab.trace.timeline import PREDICTED_NOTE, Timeline

MOST_ROWS = 8  # that are drawn: all ranks, or some stages of one replica
_MOST_ACTIONS, _MOST_ACTIONS_ELSEWHERE = 256, 96  # forwards of all stages that are played, of up to 8 ranks and of more
_MOST_MESSAGES = 400  # on the tensor axis that are drawn layer by layer


class PredictedStep(NamedTuple):
    """What is drawn of a step.

    Args:
        timeline: a rank a row.
        rows: their names.
        num_microbatches: that are drawn.
    """

    timeline: Timeline
    rows: list[str]
    num_microbatches: int


class LayerTime(NamedTuple):
    """Of one layer and one micro-batch, in seconds; messages are those on the tensor axis.

    Args:
        forward_s: computing.
        backward_s: likewise, with another forward where it is recomputed.
        forward_sent_s: messages.
        backward_sent_s: likewise, with those of the other forward.
        forward_bytes: that a rank sends.
        backward_bytes: likewise.
    """

    forward_s: float
    backward_s: float
    forward_sent_s: float
    backward_sent_s: float
    forward_bytes: int
    backward_bytes: int


class _Piece(NamedTuple):
    """A message on the tensor axis, in shares of the action that it is in."""

    start: float
    end: float
    size_bytes: int


def layer_times(plan: Plan, model: Transformer, batch: int, machine: Machine) -> list[LayerTime]:
    """What every layer of the chain should take a rank that has its device for itself.

    Args:
        plan: how.
        model: what is trained.
        batch: samples of a step.
        machine: on what.

    Raises:
        MplabError: as `mplab.plan.predict.predict`.
    """
    share = share_of(plan, model, batch)
    loads = layer_loads(model, share.size, plan.tp, plan.sequence_parallel)
    seconds = kind_times(share, machine, plan.recompute).T.tolist()
    again = plan.recompute
    first, block, last = (
        LayerTime(
            f, b, f_sent, b_sent, load.forward.sent_bytes, load.backward.sent_bytes + again * load.forward.sent_bytes
        )
        for (f, b, f_sent, b_sent), load in zip(seconds, loads, strict=True)
    )
    return [first, *[block] * model.num_layers, last]


def predicted_step(prediction: Prediction, model: Transformer, batch: int, machine: Machine) -> PredictedStep:
    """The step that was predicted: of up to 8 ranks all, of more the stages of one replica, one rank each.

    Messages of gradients and weights are drawn after the schedule, in the order in which the prediction adds them up.

    Args:
        prediction: of the plan.
        model: as it was predicted for.
        batch: likewise.
        machine: likewise.
    """
    plan = prediction.plan
    share = share_of(plan, model, batch)
    layers = layer_times(plan, model, batch, machine)
    most = _MOST_ACTIONS if plan.num_ranks <= MOST_PLAYED else _MOST_ACTIONS_ELSEWHERE
    num_microbatches = min(plan.num_microbatches, max(1, most // plan.num_stages))
    schedule = _schedule("1f1b" if plan.pp == 1 else plan.schedule, plan.pp, num_microbatches)
    num_devices = machine.num_devices / (plan.dp * plan.tp)
    costs = [_slower(cost, max(1.0, 1 / num_devices)) for cost in stage_costs(share, plan.recompute, machine)]
    played = simulate(schedule, costs, stage_link(share, machine), max(1, math.floor(num_devices)))
    events = [*played.events, *_tensor_messages(played, schedule, share, layers, plan.recompute)]
    events += _tail(prediction, share, machine, played.makespan_s)
    mesh = Mesh(plan.dp, plan.pp, plan.tp)
    if plan.num_ranks <= MOST_PLAYED:
        ranks = [[mesh.rank(d, p, t) for d in range(plan.dp) for t in range(plan.tp)] for p in range(plan.pp)]
        events = [_on(rank, event) for event in events for rank in ranks[event.rank]]
        rows = [f"rank {rank}" for rank in range(plan.num_ranks)]
    else:
        shown = range(0, plan.pp, -(-plan.pp // MOST_ROWS))
        events = [_on(shown.index(event.rank), event) for event in events if event.rank in shown]
        rows = [f"rank {mesh.rank(0, p, 0)}" for p in shown]
    notes = (PREDICTED_NOTE, *_notes(plan, machine, num_microbatches, rows))
    return PredictedStep(Timeline(events, len(rows), notes), rows, num_microbatches)


def _on(rank: int, e: Event) -> Event:
    """The same on another rank; `dataclasses.replace` takes three times as long, and there are hundreds of them."""
    return Event(rank, e.lane, e.name, e.start_s, e.end_s, e.size_bytes, e.microbatch)


def _notes(plan: Plan, machine: Machine, num_microbatches: int, rows: list[str]) -> Iterator[str]:
    if machine.ranks_per_device > 1:
        cores = f"{machine.num_devices} core{'s' * (machine.num_devices > 1)}"
        yield f"{machine.ranks} ranks share {cores}: times are not speed-ups"
    if plan.num_ranks > MOST_PLAYED:
        stages = "every stage" if len(rows) == plan.pp else f"{len(rows)} of {plan.pp} stages"
        yield f"drawn: {stages} of one replica, of each one rank; all {plan.num_ranks:,} ranks do alike"
    if num_microbatches < plan.num_microbatches:
        yield f"drawn: {num_microbatches} of {plan.num_microbatches:,} micro-batches; the time above is that of all"
    if plan.zero > 1 and plan.dp > 1:
        yield "data axis: what computing does not hide, drawn after it in one piece"
    if plan.pp > 1:
        yield "update: what other ranks' computing does not hide"


@lru_cache(maxsize=256)
def _schedule(order: str, num_ranks: int, num_microbatches: int) -> Schedule:
    return build(order, num_ranks, num_microbatches)


def _slower(cost: LayerCost, times: float) -> LayerCost:
    """Where ranks share a device that all of them use."""
    names = ("forward_s", "backward_s", "input_gradient_s", "weight_gradient_s")
    return replace(cost, **{name: times * getattr(cost, name) for name in names})


def _tensor_messages(
    played: Timeline, schedule: Schedule, share: Share, layers: list[LayerTime], recompute: bool
) -> Iterator[Event]:
    """In every action those of its layers, one after another; of very many one for each action."""
    if share.tp == 1:
        return
    num_copies = MOST_ROWS // share.pp or 1
    is_fine = 2 * schedule.num_microbatches * len(layers) * num_copies <= _MOST_MESSAGES
    inside: dict[tuple[int, str], list[_Piece]] = {}
    for stage, (start, end) in enumerate(bounds(share.stages)):
        rank, chunk = stage % share.pp, f" of chunk {stage // share.pp}" if schedule.num_stages > share.pp else ""
        own = layers[start:end]
        forward = [(layer.forward_s, layer.forward_sent_s, layer.forward_bytes) for layer in own]
        backward = [(layer.backward_s, layer.backward_sent_s, layer.backward_bytes) for layer in reversed(own)]
        # weights' gradients have no messages, and come later in an action of their own
        again_s = [layer.forward_s if recompute else 0.0 for layer in reversed(own)]
        first = [((s + again) / 2, sent_s, size) for (s, sent_s, size), again in zip(backward, again_s, strict=True)]
        for name, parts in (("forward", forward), ("backward", backward), ("input gradient", first)):
            inside[rank, name + chunk] = list(_pieces(parts, is_fine))
    for event in played.events:
        if event.lane == "compute":
            for piece in inside.get((event.rank, event.name), ()):
                start_s, end_s = (event.start_s + part * event.duration_s for part in (piece.start, piece.end))
                yield Event(event.rank, "message", "tensor axis", start_s, end_s, piece.size_bytes, event.microbatch)


def _pieces(parts: list[tuple[float, float, int]], is_fine: bool) -> Iterator[_Piece]:
    """Of (seconds of computing, seconds of messages, bytes), layer by layer."""
    if not is_fine:
        parts = [tuple(map(sum, zip(*parts, strict=True)))]  # type: ignore[list-item]
    total_s = sum(computed_s + sent_s for computed_s, sent_s, _ in parts)
    now_s = 0.0
    for computed_s, sent_s, size in parts:
        now_s += computed_s
        if sent_s:
            yield _Piece(now_s / total_s, min(1.0, (now_s + sent_s) / total_s), size)
        now_s += sent_s


def _tail(prediction: Prediction, share: Share, machine: Machine, start_s: float) -> Iterator[Event]:
    """What comes once a step, on every rank of a replica: gradients of tied weights, those that are partial on the
    tensor axis, those of the replicas; the update.
    """
    plan = prediction.plan
    call_s = machine.ranks_per_device * machine.call_s
    tied, partial = pipeline_sent(share, plan.num_microbatches)[1], partial_gradients(share, plan)
    tied_s = machine.link(plan.pp, plan.tp).time_s(tied.num_sent, tied.sent_bytes) + pipeline_calls(share) * call_s
    partial_s = machine.link(plan.tp, 1).time_s(partial.num_sent, partial.sent_bytes) + plan.sequence_parallel * call_s
    everyone = range(plan.pp)
    steps = (
        ("message", "pipeline axis", tied_s, tied.sent_bytes, sorted({0, plan.pp - 1})),
        ("message", "tensor axis", partial_s, partial.sent_bytes, everyone),
        ("message", "data axis", prediction.data_s, prediction.data_bytes, everyone),
        ("compute", "update", prediction.update_s, 0, everyone),
    )
    for lane, name, seconds, size, ranks in steps:
        if seconds:
            for rank in ranks:
                yield Event(rank, lane, name, start_s, start_s + seconds, size)  # type: ignore[arg-type]
            start_s += seconds
