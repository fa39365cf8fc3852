from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from drawing import STACKED, boxes_of, drawing_page
from test_timeline import bars, labels

from mplab.errors import MplabError
from mplab.trace import Event, Timeline
from mplab.trace.compare import Comparison, median_step, steps

MS = 1e-3
SHARED = "2 ranks share 1 core: times are not speed-ups"

PREDICTED = Timeline(
    [
        Event(0, "compute", "forward", 0, 4 * MS, microbatch=0),
        Event(0, "message", "send", 4 * MS, 5 * MS, 4096, 0),
        Event(1, "wait", "recv", 0, 5 * MS, microbatch=0),
        Event(1, "compute", "forward", 5 * MS, 9 * MS, microbatch=0),
    ],
    num_ranks=2,
    notes=("predicted, not measured", SHARED),
    title="naive",
)
MEASURED = Timeline(
    [
        Event(0, "compute", "forward", 0.5 * MS, 5 * MS, microbatch=0),
        Event(0, "message", "send", 5 * MS, 5.5 * MS, 4096, 0),
        Event(1, "wait", "recv", 0.2 * MS, 6 * MS),
        Event(1, "compute", "forward", 6 * MS, 10 * MS, microbatch=0),
    ],
    num_ranks=2,
    notes=(SHARED, "emulated link: 50 µs latency, 1 GB/s"),
)
BOTH = Comparison(PREDICTED, MEASURED, (("ideal", 8 * MS), ("imbalance", 1.5 * MS), ("shared cores", -0.5 * MS)))


# --- in numbers and in words ----------------------------------------------------------------------------------------


def test_parts_add_up_to_what_was_measured() -> None:
    assert [name for name, _ in BOTH.parts] == ["ideal", "imbalance", "shared cores", "unexplained"]
    assert BOTH.measured_s == 10 * MS
    assert math.isclose(math.fsum(seconds for _, seconds in BOTH.parts), 10 * MS, rel_tol=1e-15), "but for one rounding"
    assert dict(BOTH.parts)["unexplained"] == pytest.approx(1 * MS)
    assert Comparison(PREDICTED, MEASURED).parts == (("predicted", 9 * MS), ("unexplained", 10 * MS - 9 * MS))


def test_the_error_is_a_share_of_what_was_measured() -> None:
    assert BOTH.error == pytest.approx(-0.1)
    assert replace(BOTH, predicted=MEASURED, measured=PREDICTED).error == pytest.approx(1 / 9)


def test_notes_of_both_stand_there_and_common_ones_once() -> None:
    assert BOTH.notes == ("measured: emulated link: 50 µs latency, 1 GB/s", SHARED)


def test_it_prints_as_a_table() -> None:
    assert str(BOTH) == repr(BOTH)
    assert str(BOTH).splitlines() == [
        "part              time  of measured",
        "ideal         +8.00 ms       80.0 %",
        "imbalance     +1.50 ms       15.0 %",
        "shared cores   −500 µs       −5.0 %",
        "unexplained   +1.00 ms       10.0 %",
        "measured       10.0 ms      100.0 %",
        "predicted 9.00 ms, measured 10.0 ms: 10.0 % too short",
        *(f"note: {note}" for note in BOTH.notes),
    ]
    assert "9.00 ms: 11.1 % too long" in str(Comparison(MEASURED, PREDICTED))


def test_it_is_a_table_in_a_notebook() -> None:
    table = replace(BOTH, causes=(("<ideal>", 9 * MS),))._repr_html_()
    assert "<th style='text-align:left'>&lt;ideal&gt;</th><td>+9.00 ms</td><td>90.0 %</td>" in table
    assert f"<p>{SHARED}</p>" in table


def test_the_description_says_in_words_what_the_figures_show() -> None:
    assert BOTH.describe().splitlines() == [
        "naive: predicted 9.00 ms, measured 10.0 ms: the prediction is 10.0 % too short.",
        "Parts: ideal +8.00 ms, imbalance +1.50 ms, shared cores −500 µs, unexplained +1.00 ms; "
        "they add up to 10.0 ms.",
        "Predicted: 2 ranks, 4 events, 9.00 ms.",
        "Rank 0: busy for 4.00 ms (forward ×1); sending for 1.00 ms (send ×1); waiting for 0.00 s.",
        "Rank 1: busy for 4.00 ms (forward ×1); sending for 0.00 s; waiting for 5.00 ms (recv ×1); "
        "the longest wait 5.00 ms in recv, from 0.00 s on.",
        "Load balance L = 1.00.",
        "Measured: 2 ranks, 4 events, 9.80 ms.",
        "Rank 0: busy for 4.50 ms (forward ×1); sending for 500 µs (send ×1); waiting for 0.00 s.",
        "Rank 1: busy for 4.00 ms (forward ×1); sending for 0.00 s; waiting for 5.80 ms (recv ×1); "
        "the longest wait 5.80 ms in recv, from 200 µs on.",
        "Load balance L = 1.06.",
        *(f"Note: {note}." for note in BOTH.notes),
    ]


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (replace(PREDICTED, num_ranks=3), "prediction for 3 ranks and a measurement of 2"),
        (replace(PREDICTED, events=()), "without events"),
    ],
)
def test_what_cannot_be_compared_is_refused(predicted: Timeline, message: str) -> None:
    with pytest.raises(MplabError, match=message):
        Comparison(predicted, MEASURED)


# --- the steps of a run ---------------------------------------------------------------------------------------------


def run_of(*lengths_ms: float) -> Timeline:
    """Steps one after the other; rank 1 begins each 1 ms later."""
    events, start = [], 0.25
    for i, length in enumerate(lengths_ms):
        for rank in range(2):
            begin, end = (start + rank) * MS, (start + length) * MS
            events += [
                Event(rank, "compute", "step", begin, end),
                Event(rank, "compute", f"forward {i}", begin, end),
                Event(rank, "wait", "barrier", end, end + MS),
            ]
        start += length + 2
    return Timeline(events, 2, (SHARED,))


def test_a_run_is_taken_apart_in_its_steps() -> None:
    first, second = steps(run_of(5, 3))
    assert [e.name for e in first.events] == ["forward 0"] * 2
    assert [e.name for e in second.events] == ["forward 1"] * 2
    assert [e.start_s for e in second.events] == pytest.approx([0, 1 * MS])
    assert [e.end_s for e in second.events] == pytest.approx([3 * MS] * 2)
    assert second.notes == (SHARED,)


def test_the_median_step_is_one_that_ran() -> None:
    for lengths, median in (((5, 3, 9), 5), ((5, 3, 9, 4), 4), ((7,), 7)):
        assert max(e.end_s for e in median_step(steps(run_of(*lengths))).events) == pytest.approx(median * MS)


def test_ranks_with_different_numbers_of_steps_are_refused() -> None:
    run = run_of(5, 3)
    with pytest.raises(MplabError, match=r'ranks have \[2, 1\] spans "step"'):
        steps(replace(run, events=[e for e in run.events if (e.rank, e.start_s < 5 * MS, e.name) != (1, True, "step")]))


# --- as figures -----------------------------------------------------------------------------------------------------


def test_the_prediction_is_outlined_above_what_was_measured() -> None:
    figure = BOTH.figure()
    predicted = [trace for trace in bars(figure) if trace.name.startswith("predicted")]
    measured = [trace for trace in bars(figure) if not trace.name.startswith("predicted")]
    assert [trace.name for trace in bars(figure)] == [
        "predicted",
        "predicted message",
        "compute: forward",
        "wait",
        "message",
    ]
    assert {trace.marker.color for trace in predicted} == {"rgba(0,0,0,0)"}
    assert predicted[0].marker.line.width > max(trace.marker.line.width for trace in measured)
    assert sum(len(trace.x) for trace in predicted) == 3  # its wait is where nothing is drawn
    assert sum(len(trace.x) for trace in measured) == 4
    for rank in range(2):
        lower = [y + w / 2 for t in predicted for y, w in zip(t.y, t.width, strict=True) if round(y) == rank]
        upper = [y - w / 2 for t in measured for y, w in zip(t.y, t.width, strict=True) if round(y) == rank]
        assert max(lower) < min(upper)
        assert rank - 0.5 < min(upper) < rank + 0.5


def test_both_are_on_the_same_axis_from_the_start_of_the_step() -> None:
    figure = BOTH.figure()
    starts = {trace.name: (trace.base, trace.x) for trace in bars(figure)}
    assert starts["predicted"] == (pytest.approx((0, 5)), pytest.approx((4, 4)))
    assert starts["compute: forward"] == (pytest.approx((0.5, 6)), pytest.approx((4.5, 4)))
    low, high = figure.layout.xaxis.range
    assert low < 0  # the first outline is not cut
    assert high == pytest.approx(10 * 1.005)
    assert figure.layout.title.text == "naive: predicted 9.00 ms, measured 10.0 ms"
    assert [text for text in labels(figure) if text.startswith("forward")] == ["forward 0"] * 4
    assert bars(figure)[0].hovertext[0].startswith("<b>forward</b> (predicted compute, rank 0)")


def test_neighbours_that_differ_by_rounding_are_as_high_as_others() -> None:
    third = 0.1 + 0.2  # 0.30000000000000004
    touching = Timeline([Event(0, "compute", "f", 0, third), Event(0, "compute", "f", 0.3, 0.5)], 1)
    (trace,) = bars(touching.figure())
    assert trace.width == (0.8, 0.8)


def test_the_parts_stand_on_each_other() -> None:
    (trace,) = bars(BOTH.parts_figure())
    assert trace.base == pytest.approx((0, 8, 9.5, 9, 0))
    assert trace.x == pytest.approx((8, 1.5, -0.5, 1, 10))
    assert trace.marker.pattern.shape == ("", "", "/", "", "")
    assert BOTH.parts_figure().layout.yaxis.ticktext == (
        "ideal +8.00 ms",
        "imbalance +1.50 ms",
        "shared cores −500 µs",
        "unexplained +1.00 ms",
        "measured 10.0 ms",
    )


def test_the_notes_stand_under_both_figures() -> None:
    for figure in (BOTH.figure(), BOTH.parts_figure()):
        (annotation,) = figure.layout.annotations
        assert annotation.text.split("<br>") == list(BOTH.notes)


def test_without_plotly_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    for figure in (BOTH.figure, BOTH.parts_figure):
        with pytest.raises(MplabError, match="pip install"):
            figure()


def many() -> Comparison:
    """Four ranks, many micro-batches, long names and notes."""

    def timeline(scale: float, notes: tuple[str, ...]) -> Timeline:
        names = ["forward of chunk 0", "backward of chunk 0", "forward of chunk 1", "backward of chunk 1", "update"]
        events = [
            Event(rank, "compute", names[i % 5], (i + rank) * scale, (i + rank + 0.8) * scale, 0, i)
            for rank in range(4)
            for i in range(20)
        ]
        sent = [Event(rank, "message", "send", i * scale, (i + 0.3) * scale, 10, i) for rank in (0, 1) for i in (2, 3)]
        return Timeline([*events, *sent, Event(3, "wait", "recv", 0, 2 * scale)], 4, notes)

    long = "what takes more than one line to say in a figure of the width that notebooks have: " * 2
    causes = [("a part with a longer name", 15 * MS), ("transfer", -math.pi * 1e-5), ("launch", 4 * MS)]
    return Comparison(timeline(1 * MS, (long,)), timeline(1.1 * MS, (long, SHARED)), causes, "interleaved")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with drawing_page() as made:
        yield made


@pytest.mark.browser
@pytest.mark.parametrize("width", [600, 1100])
def test_no_part_of_the_figures_meets_another_or_is_cut(page: Any, width: int) -> None:
    for comparison in (BOTH, many()):
        for figure in (comparison.figure(), comparison.parts_figure()):
            boxes = boxes_of(page, figure, width)
            assert boxes["notes"]
            assert sum(1 for part in STACKED if boxes[part]) >= 5
            for label in boxes["labels"]:
                assert not any(meet(label, other) for other in boxes["labels"] if other is not label)


def meet(a: list[float], b: list[float]) -> bool:
    """Whether two boxes overlap by more than a pixel, as the boxes of letters may."""
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 3
