from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.plan.explain import explain
from mplab.plan.layer_cost import LayerCost
from mplab.plan.schedule import ORDERS, build
from mplab.plan.simulate import simulate
from mplab.trace import Event, Timeline
from mplab.trace.timeline import PREDICTED_NOTE

MS = 1e-3
NAMES = ["ideal", "imbalance", "transfer", "launch", "shared cores", "unexplained"]


def measured(num_ranks: int, seconds: float) -> Timeline:
    return Timeline([Event(rank, "compute", "forward", 0, seconds) for rank in range(num_ranks)], num_ranks)


def stage(forward_s: float, backward_s: float, update_s: float = 0.0) -> LayerCost:
    return LayerCost("s", forward_s, backward_s, update_s=update_s, output_bytes=1000)


def test_parts_worked_by_hand() -> None:
    """Naive, 2 ranks, 1 micro-batch: F on 0, F on 1, B on 1, B on 0, one after the other; then the updates."""
    schedule = build("naive", 2, 1)
    costs = [stage(1 * MS, 2 * MS, 1 * MS), stage(3 * MS, 6 * MS, 0.5 * MS)]
    link = Link(0.1 * MS, 1e6)  # 1000 bytes take 1.1 ms
    comparison = explain(schedule, costs, measured(2, 20 * MS), link, cores=2, launch_s=0.2 * MS)
    parts = dict(comparison.parts)
    assert list(parts) == NAMES
    assert parts["ideal"] == pytest.approx((2 * 2 + 2 * 4 + 0.75) * MS)
    assert parts["imbalance"] == pytest.approx((1 + 3 + 6 + 2 + 1 - 12.75) * MS)
    assert parts["transfer"] == pytest.approx(2 * 1.1 * MS)
    assert parts["launch"] == pytest.approx(4 * 0.2 * MS)
    assert parts["shared cores"] == 0
    assert comparison.predicted_s == pytest.approx((13 + 2.2 + 0.8) * MS)
    assert parts["unexplained"] == pytest.approx(4 * MS)


def test_shared_cores_cost_what_the_ranks_wait_for_them() -> None:
    """GPipe, 2 equal ranks: where both compute, one core takes twice as long."""
    schedule = build("gpipe", 2, 4)
    costs = [stage(1 * MS, 2 * MS)] * 2
    alone, shared = (dict(explain(schedule, costs, measured(2, 1), cores=c).parts) for c in (2, 1))
    assert alone["shared cores"] == 0
    assert shared["ideal"] == alone["ideal"] == pytest.approx(15 * MS)
    assert shared["shared cores"] == pytest.approx(9 * MS)  # 24 ms of work on one core, and 15 ms on two


times = st.floats(1e-6, 1e-1)


@given(
    st.sampled_from(sorted(ORDERS)),
    st.integers(1, 4),
    st.integers(1, 5),
    st.lists(st.tuples(times, times, times), min_size=8, max_size=8),
    st.floats(1e-3, 10),
    st.none() | st.builds(Link, st.floats(0, 1e-3), st.floats(1e6, 1e10)),
    st.none() | st.integers(1, 4),
    st.floats(0, 1e-4),
)
def test_parts_add_up_to_the_measured_time(
    order: str,
    num_ranks: int,
    num_microbatches: int,
    seconds: list[tuple[float, float, float]],
    factor: float,
    link: Link | None,
    cores: int | None,
    launch_s: float,
) -> None:
    schedule = build(order, num_ranks, num_microbatches)
    costs = [stage(*three) for three in seconds[: schedule.num_stages]]
    predicted = simulate(schedule, costs, link, cores, launch_s)
    comparison = explain(schedule, costs, measured(num_ranks, factor * predicted.makespan_s), link, cores, launch_s)
    assert [name for name, _ in comparison.parts] == NAMES
    assert comparison.predicted.events == predicted.events
    causes = sum(s for _, s in comparison.causes)
    assert causes == pytest.approx(comparison.predicted_s, rel=1e-12, abs=0)
    assert sum(s for _, s in comparison.parts) == pytest.approx(comparison.measured_s, rel=1e-12, abs=0)
    assert dict(comparison.parts)["shared cores"] >= -1e-12


def test_a_prediction_that_is_right_leaves_nothing_unexplained() -> None:
    schedule = build("1f1b", 2, 3)
    costs = [stage(1 * MS, 2 * MS), stage(1.5 * MS, 2.5 * MS)]
    comparison = explain(schedule, costs, simulate(schedule, costs, launch_s=1e-5), launch_s=1e-5)
    assert comparison.error == 0
    assert dict(comparison.parts)["unexplained"] == pytest.approx(0, abs=1e-15)


def test_equal_stages_are_the_ideal() -> None:
    schedule = build("1f1b", 3, 4)
    parts = dict(explain(schedule, [stage(1 * MS, 2 * MS, 1 * MS)] * 3, measured(3, 1)).parts)
    assert parts["ideal"] == pytest.approx((3 * 6 + 1) * MS)  # (m + p - 1)(F + B), and the update
    assert parts["imbalance"] == pytest.approx(0, abs=1e-12)


def test_the_prediction_has_the_schedules_name_and_says_that_it_is_one() -> None:
    schedule = build("zero_bubble", 3, 4)
    comparison = explain(schedule, [stage(1, 2)] * 3, measured(3, 20), Link(1e-5, 1e9), cores=2)
    assert comparison.predicted.title == "zero_bubble"
    assert comparison.predicted.notes[0] == PREDICTED_NOTE
    assert PREDICTED_NOTE not in comparison.notes, "the figure of both says which is which"
    assert any("share 2 cores" in note for note in comparison.notes)


def test_what_does_not_fit_is_refused() -> None:
    schedule = build("gpipe", 2, 2)
    with pytest.raises(MplabError, match="2 stages"):
        explain(schedule, [stage(1, 2)] * 3, measured(2, 1))
    with pytest.raises(MplabError, match="2 ranks and a measurement of 3"):
        explain(schedule, [stage(1, 2)] * 2, measured(3, 1))
    with pytest.raises(MplabError, match="cores=0"):
        explain(schedule, [stage(1, 2)] * 2, measured(2, 1), cores=0)
    assert replace(explain(schedule, [stage(1, 2)] * 2, measured(2, 1)), title="x").title == "x"
