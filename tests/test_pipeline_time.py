"""Closed forms of a pipeline's step, beside the schedules played out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost
from mplab.plan.pipeline_time import closed_form_s, most_held, most_recomputed, played_s
from mplab.plan.schedule import ORDERS, build
from mplab.plan.simulate import FREE, activation_bytes, simulate

FORWARDS = [1.0, 1.3, 0.9, 1.1, 1.25, 0.8, 1.0, 1.05]


def pipe(order: str, num_ranks: int, forwards: Sequence[float]) -> tuple[list[LayerCost], tuple[list[float], ...]]:
    """The cost of each stage, and those of each rank: forward, backward and its part for the weights."""
    num_chunks = 2 if order == "interleaved" else 1
    of_stages = [f / num_chunks for f in forwards[:num_ranks]] * num_chunks
    costs = [LayerCost(f"{i}", f, 2 * f, output_bytes=1) for i, f in enumerate(of_stages)]
    of_ranks = forwards[:num_ranks]
    return costs, ([*of_ranks], [2 * f for f in of_ranks], [*of_ranks])


def settings_of(order: str) -> list[tuple[int, int]]:
    of_order = product((2, 3, 4, 8), (1, 2, 3, 4, 8, 16, 24))
    return [(p, m) for p, m in of_order if order != "interleaved" or not m % p]


@pytest.mark.parametrize("order", ORDERS)
def test_the_closed_form_of_equal_ranks_is_exact(order: str) -> None:
    for p, m in settings_of(order):
        costs, of_ranks = pipe(order, p, [1.0] * p)
        want = simulate(build(order, p, m), costs).makespan_s
        assert closed_form_s(order, m, *of_ranks, 0.0) == pytest.approx(want), (p, m)


@pytest.mark.parametrize("parts", [(1, 1, 1), (1, 1, 2), (3, 1, 1), (2, 1, 0.5), (1, 2, 1)], ids=str)
def test_the_closed_form_of_a_split_backward_is_exact(parts: tuple[float, float, float]) -> None:
    """Whichever is the longest: forward, gradients of inputs or of weights; b longer than f + i, or shorter."""
    f, i, w = parts
    for p, m in settings_of("zero_bubble"):
        costs = [LayerCost("", f, i + w, i, w) for _ in range(p)]
        want = simulate(build("zero_bubble", p, m), costs).makespan_s
        assert closed_form_s("zero_bubble", m, [f] * p, [i + w] * p, [w] * p, 0.0) == pytest.approx(want), (p, m)


@pytest.mark.parametrize("message_s", [0.02, 0.2])
def test_the_closed_form_of_two_stages_a_rank_counts_the_messages(message_s: float) -> None:
    for p, m in settings_of("interleaved"):
        costs, of_ranks = pipe("interleaved", p, [1.0] * p)
        want = simulate(build("interleaved", p, m), costs, Link(message_s, math.inf)).makespan_s
        assert closed_form_s("interleaved", m, *of_ranks, message_s) == pytest.approx(want), (p, m)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("message_s", [0.0, 0.02, 0.2])
def test_the_closed_form_is_near_of_other_ranks(order: str, message_s: float) -> None:
    """Unequal ranks and messages: exact for the orders in which one phase follows another, else within 10 or 15 %."""
    for p, m in settings_of(order):
        costs, of_ranks = pipe(order, p, FORWARDS)
        want = simulate(build(order, p, m), costs, Link(message_s, math.inf)).makespan_s
        near = 1e-9 if order in ("naive", "gpipe") else 0.15 if order == "interleaved" else 0.1
        assert closed_form_s(order, m, *of_ranks, message_s) == pytest.approx(want, rel=near), (p, m)


def test_one_rank_has_no_bubble() -> None:
    assert {closed_form_s(order, 5, [1], [2], [1], 9.0) for order in ORDERS} == {15}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_of_many_microbatches_some_are_played(order: str, num_ranks: int) -> None:
    costs, _ = pipe(order, num_ranks, FORWARDS)
    link = Link(0.05, math.inf)
    for m in (1, num_ranks, 5 * num_ranks, 9 * num_ranks, *([] if order == "interleaved" else [17, 23])):
        whole_s = simulate(build(order, num_ranks, m), costs, link).makespan_s
        assert played_s(order, m, costs, num_ranks, link, num_ranks) == pytest.approx(whole_s, rel=5e-3), m


def test_devices_that_ranks_share() -> None:
    costs, _ = pipe("1f1b", 4, FORWARDS)
    play = {n: played_s("1f1b", 4, costs, 4, FREE, n) for n in (0.5, 1, 2, 4, 8)}
    assert play[4] == play[8] == simulate(build("1f1b", 4, 4), costs).makespan_s
    assert play[2] == simulate(build("1f1b", 4, 4), costs, cores=2).makespan_s
    assert play[1] == pytest.approx(4 * 3 * sum(FORWARDS[:4]))  # nobody is idle
    assert play[0.5] == pytest.approx(2 * play[1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_in_flight_is_what_the_schedule_holds(order: str, recompute: bool) -> None:
    for p, m in [*settings_of(order), *([] if order == "interleaved" else [(1, 1), (1, 3)])]:
        schedule = build(order, p, m)
        costs = [LayerCost("", output_bytes=1, activation_bytes=100) for _ in range(schedule.num_stages)]
        for rank, want in enumerate(activation_bytes(schedule, costs, recompute)):
            held = most_held(order, p, rank, m)
            inputs = [1 if place * p + rank else 0 for place in range(len(held))]
            got = 100 * sum(held)
            if recompute:
                whole = most_recomputed(order, rank, m) * (100 - min(inputs))
                got = sum(n * size for n, size in zip(held, inputs, strict=True)) + whole
            near = 1 if order == "interleaved" and recompute else 0  # an input more or less
            assert abs(got - want) <= near, (p, m, rank)
