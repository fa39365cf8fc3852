"""Predicted timelines against `Schedule.ends`, against formulas, and by hand; memory by hand."""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost
from mplab.plan.schedule import ORDERS, Action, Schedule, build, interleaved
from mplab.plan.simulate import activation_bytes, memory_bytes, simulate
from mplab.trace.event import Event
from mplab.trace.timeline import Timeline

Span = tuple[str, float, float]


def stages(*costs: tuple[float, float], output_bytes: float = 0) -> list[LayerCost]:
    """Of (forward, backward)."""
    return [LayerCost(str(i), f, b, output_bytes=output_bytes) for i, (f, b) in enumerate(costs)]


def delay(seconds: float) -> Link:
    """Every message takes so long, however large."""
    return Link(seconds, math.inf)


def computed(timeline: Timeline) -> list[list[Span]]:
    """Every rank's pieces: "F0", start, end."""
    letters = {"forward": "F", "backward": "B", "input gradient": "I", "weight gradient": "W", "update": "U"}
    return [
        [
            (f"{letters[e.name]}{'' if e.microbatch is None else e.microbatch}", e.start_s, e.end_s)
            for e in timeline.rank(rank)
            if e.lane == "compute"
        ]
        for rank in range(timeline.num_ranks)
    ]


def of_lane(timeline: Timeline, rank: int, *lanes: str) -> list[Event]:
    return sorted((e for e in timeline.rank(rank) if e.lane in lanes), key=lambda e: (e.start_s, e.end_s))


NUMBERS = st.floats(0.0, 9.0) | st.integers(1, 3)


@st.composite
def steps(draw: st.DrawFn, max_ranks: int = 4) -> tuple[Schedule, list[LayerCost]]:
    """A schedule, and costs of its stages."""
    orders = [*(order for name, order in ORDERS.items() if name != "interleaved")]
    orders += [partial(interleaved, num_chunks=v) for v in (1, 2, 3)]
    schedule = build(draw(st.sampled_from(orders)), draw(st.integers(1, max_ranks)), draw(st.integers(1, 5)))
    costs = [
        LayerCost(str(i), *(draw(NUMBERS) for _ in range(5)), output_bytes=draw(st.integers(0, 9)))
        for i in range(schedule.num_stages)
    ]
    return schedule, costs


LINKS = st.none() | st.builds(Link, st.floats(0.0, 5.0), st.floats(0.5, 100.0))
MACHINES = st.fixed_dictionaries(
    {"link": LINKS, "cores": st.none() | st.integers(1, 4), "launch_s": st.floats(0.0, 1.0) | st.just(0.0)}
)


def seconds(costs: list[LayerCost], action: Action) -> float:
    cost = costs[action.stage]
    return {
        "F": cost.forward_s,
        "B": cost.backward_s,
        "I": cost.input_gradient_s,
        "W": cost.weight_gradient_s,
    }[action.kind]


def spans(schedule: Schedule, timeline: Timeline) -> dict[Action, Event]:
    """The event of every action; nothing else is computed but updates."""
    found = {(e.rank, e.name, e.microbatch): e for e in timeline.events if e.lane == "compute"}
    actions = {(schedule.rank_of[a.stage], schedule.span_name(a), a.microbatch): a for a in schedule.actions}
    assert {key for key in found if key[1] != "update"} == set(actions)
    assert len(found) == sum(e.lane == "compute" for e in timeline.events)
    return {action: found[key] for key, action in actions.items()}


# --- free messages, a core a rank -----------------------------------------------------------------------------------


@given(steps(), st.sampled_from([None, 0, 1]))
def test_it_is_exactly_what_the_schedule_says(step: tuple[Schedule, list[LayerCost]], spare_cores: int | None) -> None:
    schedule, costs = step
    cores = None if spare_cores is None else schedule.num_ranks + spare_cores
    ends = schedule.ends(lambda action: seconds(costs, action))
    found = spans(schedule, simulate(schedule, costs, cores=cores))
    assert {action: event.end_s for action, event in found.items()} == ends


def test_1f1b_by_hand() -> None:
    timeline = simulate(build("1f1b", 2, 2), stages((1, 2), (1, 2)), title="by hand")
    assert computed(timeline) == [
        [("F0", 0, 1), ("F1", 1, 2), ("B0", 4, 6), ("B1", 7, 9)],
        [("F0", 1, 2), ("B0", 2, 4), ("F1", 4, 5), ("B1", 5, 7)],
    ]
    waits = [(e.rank, e.name, e.start_s, e.end_s, e.microbatch) for e in timeline.events if e.lane == "wait"]
    assert waits == [(1, "recv", 0, 1, 0), (0, "recv", 2, 4, 0), (0, "recv", 6, 7, 1)]
    assert (timeline.title, timeline.num_ranks, timeline.makespan_s) == ("by hand", 2, 9)
    assert timeline.notes == ("predicted, not measured",)


def test_a_backward_without_known_parts_is_halved() -> None:
    schedule = Schedule("split", (tuple(map(Action.parse, ("0F0", "0I0", "0W0"))),))
    timeline = simulate(schedule, [LayerCost("all", 1, 6)])
    assert computed(timeline) == [[("F0", 0, 1), ("I0", 1, 4), ("W0", 4, 7)]]
    timeline = simulate(schedule, [LayerCost("all", 1, 6, 4, 1)])
    assert computed(timeline) == [[("F0", 0, 1), ("I0", 1, 5), ("W0", 5, 6)]]


# --- links ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_naive_waits_for_every_message(p: int, m: int, forward: int, backward: int, message: int) -> None:
    timeline = simulate(build("naive", p, m), stages(*[(forward, backward)] * p), delay(message))
    assert timeline.makespan_s == m * (p * (forward + backward) + 2 * (p - 1) * message)


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 9), st.integers(0, 9), st.integers(0, 20))
def test_gpipe_hides_all_messages_but_the_first_until_the_link_is_the_slowest(
    p: int, m: int, forward: int, backward: int, message: int
) -> None:
    timeline = simulate(build("gpipe", p, m), stages(*[(forward, backward)] * p), delay(message))
    slowest = [max(forward, message), max(backward, message)]
    assert timeline.makespan_s == p * (forward + backward) + 2 * (p - 1) * message + (m - 1) * sum(slowest)


def test_1f1b_pays_for_more_messages_than_gpipe() -> None:
    costs, message = stages((1, 2), (1, 2)), 0.25
    assert simulate(build("gpipe", 2, 4), costs, delay(message)).makespan_s == 15 + 2 * message
    assert simulate(build("1f1b", 2, 4), costs, delay(message)).makespan_s == 15 + 4 * message


def test_a_message_takes_latency_and_bytes_and_both_ways_are_alike() -> None:
    timeline = simulate(build("gpipe", 2, 1), stages((1, 1), (1, 1), output_bytes=6.0), Link(2, 3))
    messages = [
        (e.rank, e.name, e.start_s, e.end_s, e.size_bytes, e.microbatch) for e in timeline.events if e.size_bytes
    ]
    assert messages == [(0, "send", 1, 5, 6, 0), (1, "send", 7, 11, 6, 0)]
    assert timeline.notes == ("predicted, not measured", "link: 2.00 s latency, 3e-06 MB/s")
    assert [type(e.size_bytes) for e in timeline.events] == [int] * len(timeline.events)


def test_a_free_message_is_there_too_and_takes_no_time() -> None:
    timeline = simulate(build("gpipe", 2, 1), stages((1, 1), (1, 1), output_bytes=6))
    assert [(e.start_s, e.end_s, e.size_bytes) for e in timeline.events if e.lane == "message"] == [
        (1, 1, 6),
        (3, 3, 6),
    ]


def test_messages_of_one_sender_queue_and_it_goes_on_computing() -> None:
    timeline = simulate(build("gpipe", 2, 3), stages((1, 1), (1, 1)), delay(3))
    assert [(e.start_s, e.end_s) for e in of_lane(timeline, 0, "message")] == [(1, 4), (4, 7), (7, 10)]
    assert computed(timeline)[0][:3] == [("F0", 0, 1), ("F1", 1, 2), ("F2", 2, 3)]
    assert computed(timeline)[1][:3] == [("F0", 4, 5), ("F1", 7, 8), ("F2", 10, 11)]


def test_messages_of_one_sender_to_two_receivers_queue() -> None:
    # Rank 1: F0 F1 B0 F2 B1 B2. The gradient of B0 leaves at 14, and the activation of F2, there at 15, at 17.
    timeline = simulate(build("1f1b", 3, 3), stages((1, 1), (1, 1), (1, 1)), delay(3))
    sent = [(e.start_s, e.end_s) for e in of_lane(timeline, 1, "message")]
    assert sent == [(5, 8), (8, 11), (14, 17), (17, 20), (20, 23), (26, 29)]
    assert computed(timeline)[1][2:4] == [("B0", 13, 14), ("F2", 14, 15)]


def test_messages_to_one_receiver_queue() -> None:
    # At 10 rank 0 has the second activation for rank 1, and at 10.5 rank 2 has the first gradient for it.
    timeline = simulate(build("1f1b", 3, 2), stages((5, 1), (1, 1), (1, 1.5)), delay(1))
    assert [(e.start_s, e.end_s) for e in of_lane(timeline, 0, "message")] == [(5, 6), (10, 11)]
    assert [(e.start_s, e.end_s) for e in of_lane(timeline, 2, "message")][:1] == [(11, 12)]
    assert computed(timeline)[2][1] == ("B0", 9, 10.5)


def test_stages_of_one_rank_send_nothing() -> None:
    timeline = simulate(build("interleaved", 1, 3), stages((1, 2), (1, 2), output_bytes=9), Link(1, 1))
    assert {e.lane for e in timeline.events} == {"compute"}
    assert timeline.makespan_s == 18


def test_a_slower_stage_can_make_a_step_shorter_where_two_send_to_one() -> None:
    # Why no more than two ranks are promised below: the longer forward lets a gradient go first.
    sizes = (3, 1, 1)
    times = [
        simulate(
            build("1f1b", 3, 3),
            [LayerCost("", f, b, output_bytes=size) for (f, b), size in zip(costs, sizes, strict=True)],
            Link(4, 1),
        ).makespan_s
        for costs in ([(8, 8), (2, 2), (1, 1)], [(11, 8), (2, 2), (1, 1)])
    ]
    assert times == [74, 72]


@given(steps(max_ranks=2), LINKS, st.data())
def test_two_ranks_are_never_faster_with_slower_stages_or_links(
    step: tuple[Schedule, list[LayerCost]], link: Link | None, data: st.DataObject
) -> None:
    schedule, costs = step
    slower = [
        LayerCost(c.name, *(x + data.draw(st.floats(0, 3)) for x in fields(c)), output_bytes=c.output_bytes)
        for c in costs
    ]
    worse = Link(link.latency_s + 1, link.bandwidth_bytes_s / 2) if link else Link(1, 1)
    before = simulate(schedule, costs, link).makespan_s
    tolerance = 1e-9
    assert simulate(schedule, slower, link).makespan_s >= before - tolerance
    assert simulate(schedule, costs, worse).makespan_s >= before - tolerance


def fields(c: LayerCost) -> tuple[float, ...]:
    return c.forward_s, c.backward_s, c.input_gradient_s, c.weight_gradient_s, c.update_s


# --- cores ----------------------------------------------------------------------------------------------------------


def test_two_ranks_on_one_core_by_hand() -> None:
    timeline = simulate(build("gpipe", 2, 2), stages((1, 1), (1, 1)), cores=1)
    assert computed(timeline) == [
        [("F0", 0, 1), ("F1", 1, 3), ("B0", 5, 7), ("B1", 7, 8)],
        [("F0", 1, 3), ("F1", 3, 4), ("B0", 4, 5), ("B1", 5, 7)],
    ]
    assert timeline.notes == ("predicted, not measured", "2 ranks share 1 core: times are not speed-ups")


def test_the_speed_changes_in_the_middle_of_an_action() -> None:
    # Rank 0's second forward: 1 of 3 seconds' work in 2 seconds next to rank 1, the rest alone.
    timeline = simulate(build("gpipe", 2, 2), stages((3, 1), (1, 1)), cores=1)
    assert computed(timeline)[0][:2] == [("F0", 0, 3), ("F1", 3, 7)]
    assert computed(timeline)[1][:2] == [("F0", 3, 5), ("F1", 7, 8)]


def test_a_message_arrives_in_the_middle_of_an_action() -> None:
    # Rank 0 is alone until 3 and after 5 waits; rank 1 does 1 of 3 seconds' work next to it, and the rest alone.
    timeline = simulate(build("gpipe", 2, 2), stages((2, 1), (3, 1)), delay(1), cores=1)
    assert computed(timeline)[0][:2] == [("F0", 0, 2), ("F1", 2, 5)]
    assert computed(timeline)[1][:2] == [("F0", 3, 7), ("F1", 7, 10)]


def test_three_ranks_on_two_cores_run_at_two_thirds_of_their_speed() -> None:
    timeline = simulate(build("gpipe", 3, 3), stages((2, 0), (2, 0), (2, 0)), cores=2)
    at_4 = [span for spans in computed(timeline) for span in spans if span[1] == 4]
    assert at_4 == [("F2", 4, 7), ("F1", 4, 7), ("F0", 4, 7)]
    assert timeline.notes == ("predicted, not measured", "3 ranks share 2 cores: times are not speed-ups")


def test_a_rank_without_work_takes_no_core() -> None:
    schedule = Schedule("one of two", (build("gpipe", 1, 2).ranks[0], ()))
    timeline = simulate(schedule, stages((1, 1)), cores=1)
    assert (timeline.num_ranks, timeline.makespan_s, timeline.notes) == (2, 4, ("predicted, not measured",))


@given(steps(), st.floats(0.0, 1.0))
def test_one_core_is_never_idle_where_messages_are_free(
    step: tuple[Schedule, list[LayerCost]], launch_s: float
) -> None:
    schedule, costs = step
    timeline = simulate(schedule, costs, cores=1, launch_s=launch_s)
    work = sum(launch_s + seconds(costs, action) for action in schedule.actions) + sum(c.update_s for c in costs)
    assert timeline.makespan_s == pytest.approx(work)


@given(steps(), MACHINES)
def test_cores_do_the_work_and_no_more(step: tuple[Schedule, list[LayerCost]], machine: dict[str, Any]) -> None:
    schedule, costs = step
    timeline = simulate(schedule, costs, **machine)
    cores = machine["cores"] or schedule.num_ranks
    computing = [e for e in timeline.events if e.lane == "compute"]
    times = sorted({t for e in computing for t in (e.start_s, e.end_s)})
    done = 0.0
    for start, end in pairwise(times):
        done += (end - start) * min(cores, sum(e.start_s <= start and end <= e.end_s for e in computing))
    work = sum(machine["launch_s"] + seconds(costs, action) for action in schedule.actions)
    assert done == pytest.approx(work + sum(c.update_s for c in costs))


# --- launch and update ----------------------------------------------------------------------------------------------


def test_a_launch_comes_before_every_action() -> None:
    timeline = simulate(build("gpipe", 2, 2), stages((1, 2), (1, 2)), launch_s=0.5)
    assert computed(timeline) == computed(simulate(build("gpipe", 2, 2), stages((1.5, 2.5), (1.5, 2.5))))


def test_updates_end_a_step_without_waiting_for_anyone() -> None:
    costs = [
        LayerCost("a", 1, 1, update_s=5),
        LayerCost("b", 1, 1, update_s=3),
        LayerCost("c", 1, 1),
        LayerCost("d", 1, 1),
    ]
    timeline = simulate(build("gpipe", 4, 1), costs, launch_s=0.5)
    updates = [(e.rank, e.start_s, e.end_s, e.microbatch) for e in timeline.events if e.name == "update"]
    assert updates == [(1, 10.5, 13.5, None), (0, 12, 17, None)]


def test_a_rank_updates_all_its_stages_at_once() -> None:
    costs = [LayerCost(str(i), 1, 1, update_s=i) for i in range(4)]
    timeline = simulate(build("interleaved", 2, 1), costs)
    assert [(e.rank, e.duration_s) for e in timeline.events if e.name == "update"] == [(1, 4), (0, 2)]


# --- what holds for every timeline ----------------------------------------------------------------------------------


@given(steps(), MACHINES)
def test_every_timeline_keeps_the_rules(step: tuple[Schedule, list[LayerCost]], machine: dict[str, Any]) -> None:
    schedule, costs = step
    timeline = simulate(schedule, costs, **machine)
    again = simulate(schedule, costs, **machine)
    assert timeline.events == again.events

    link = machine["link"] or delay(0)
    found = spans(schedule, timeline)
    for action, event in found.items():
        at_full_speed = machine["launch_s"] + seconds(costs, action)
        assert event.duration_s >= at_full_speed - 1e-9
        for other in schedule.needs(action):
            near = schedule.rank_of[other.stage] == schedule.rank_of[action.stage]
            size = costs[min(action.stage, other.stage)].output_bytes
            assert event.start_s >= found[other].end_s + (0 if near else link.time_s(1, size)) - 1e-9
    for rank, actions in enumerate(schedule.ranks):
        assert [found[a].start_s for a in actions] == sorted(found[a].start_s for a in actions)
        # A rank computes or waits, one thing at a time, without a gap until it is done.
        own = of_lane(timeline, rank, "compute", "wait")
        assert own[0].start_s == 0
        assert all(before.end_s == after.start_s for before, after in pairwise(own))
        # It sends one message at a time, to each neighbour what the neighbour needs.
        sent = of_lane(timeline, rank, "message")
        assert all(before.end_s <= after.start_s for before, after in pairwise(sent))
        crossed = [
            costs[edge].output_bytes
            for stage in schedule.stages(rank)
            for edge, to in ((stage, stage + 1), (stage - 1, stage - 1))
            if 0 <= to < schedule.num_stages and schedule.rank_of[to] != rank
        ]
        assert len(sent) == len(crossed) * schedule.num_microbatches
        assert sum(e.size_bytes for e in sent) == sum(crossed) * schedule.num_microbatches


@given(steps(), MACHINES)
def test_nothing_is_faster_than_free_messages_and_a_core_a_rank(
    step: tuple[Schedule, list[LayerCost]], machine: dict[str, Any]
) -> None:
    schedule, costs = step
    assert simulate(schedule, costs, **machine).makespan_s >= simulate(schedule, costs).makespan_s - 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"costs": stages((1, 1))},
            "1 costs for the 2 stages of gpipe: give one a stage, as `stage_costs(layers, cuts)`",
        ),
        ({"cores": 0}, "cores=0: ranks share a whole number of cores, 1 or more; None is a core a rank"),
        ({"cores": 1.5}, "cores=1.5: ranks share"),
        ({"cores": True}, "cores=True: ranks share"),
        ({"launch_s": -1e-6}, "launch_s=-1e-06: a launch takes 0 seconds or more"),
        ({"launch_s": math.nan}, "launch_s=nan: a launch takes"),
        ({"launch_s": math.inf}, "launch_s=inf: a launch takes"),
        ({"launch_s": "1"}, "launch_s='1': a launch takes"),
    ],
)
def test_what_cannot_be_simulated(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MplabError, match=re.escape(message)):
        simulate(**{"schedule": build("gpipe", 2, 2), "costs": stages((1, 1), (1, 1)), **arguments})


# --- memory ---------------------------------------------------------------------------------------------------------

TWO = [
    LayerCost("a", 1, 2, output_bytes=7, activation_bytes=100, parameter_bytes=10),
    LayerCost("b", 1, 2, output_bytes=9, activation_bytes=60, parameter_bytes=20),
]


@pytest.mark.parametrize(
    ("order", "kept", "recomputed"),
    [
        # Rank 1 holds inputs of 7 bytes; with recomputation one micro-batch has all its activations again.
        ("naive", (100, 60), (100, 60)),
        ("gpipe", (4 * 100, 4 * 60), (100, 3 * 7 + 60)),
        ("1f1b", (2 * 100, 60), (100, 60)),
        # Rank 1: F0 I0 F1 I1 W0 F2 ...: two of them have been computed again when I1 ends.
        ("zero_bubble", (2 * 100, 2 * 60), (100, 2 * 60)),
    ],
)
def test_memory_by_hand(order: str, kept: tuple[int, int], recomputed: tuple[int, int]) -> None:
    schedule = build(order, 2, 4)
    assert activation_bytes(schedule, TWO) == kept
    assert activation_bytes(schedule, TWO, recompute=True) == recomputed
    assert memory_bytes(schedule, TWO) == (40 + kept[0], 80 + kept[1])
    assert memory_bytes(schedule, TWO, recompute=True) == (40 + recomputed[0], 80 + recomputed[1])
    assert memory_bytes(schedule, TWO, state_copies=0) == (20 + kept[0], 40 + kept[1])


def test_memory_of_two_chunks() -> None:
    costs = [LayerCost(str(i), 1, 2, output_bytes=i + 1, activation_bytes=10**i, parameter_bytes=i) for i in range(4)]
    schedule = build("interleaved", 2, 2)  # rank 0: 0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1; rank 1: 1F0 1F1 3F0 3B0 ...
    assert activation_bytes(schedule, costs) == (2 * 1 + 2 * 100, 2 * 10 + 1000)
    # Chunk 1 of rank 0 holds what stage 1 handed on, 2 bytes; rank 1 what stages 0 and 2 did, 1 and 3 bytes.
    assert activation_bytes(schedule, costs, recompute=True) == (2 * 0 + 2 + 100, 2 * 1 + 1000)
    assert memory_bytes(schedule, costs, state_copies=1) == (202 + 3 * 2, 1020 + 3 * 4)


@pytest.mark.parametrize("order", ORDERS)
def test_activations_of_one_byte_are_the_micro_batches_in_flight(order: str) -> None:
    for p, m in ((1, 3), (3, 2), (3, 7), (4, 4)):
        schedule = build(order, p, m)
        assert (
            activation_bytes(schedule, [LayerCost("", activation_bytes=1)] * schedule.num_stages)
            == schedule.in_flight()
        )


def test_memory_needs_a_cost_a_stage() -> None:
    for what in (memory_bytes, activation_bytes):
        with pytest.raises(MplabError, match=r"2 costs for the 4 stages of interleaved: give one a stage"):
            what(build("interleaved", 2, 2), TWO)
