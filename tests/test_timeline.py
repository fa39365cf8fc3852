from __future__ import annotations

import html
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from drawing import boxes_of, drawing_page
from hypothesis import given
from hypothesis import strategies as st

from mplab.errors import MplabError
from mplab.trace import LANES, Event, Lane, Timeline
from mplab.trace.units import columns, format_bandwidth, format_s

NOTES = ("2 ranks share 1 core: times are not speed-ups", "emulated link: 50 µs, 1 GB/s")
MS = 1e-3

STEP = Timeline(
    [
        Event(1, "wait", "recv", 0, 4 * MS, microbatch=0),
        Event(0, "compute", "step", 0, 9 * MS),
        Event(0, "compute", "forward", 1 * MS, 4 * MS, microbatch=0),
        Event(0, "compute", "backward", 4 * MS, 8 * MS, microbatch=0),
        Event(0, "message", "send", 3 * MS, 5 * MS, size_bytes=4096, microbatch=0),
        Event(0, "wait", "recv", 8 * MS, 9 * MS),
        Event(1, "compute", "forward", 4 * MS, 6 * MS, microbatch=0),
        Event(1, "message", "all_reduce", 6 * MS, 10 * MS, size_bytes=100),
    ],
    num_ranks=2,
    notes=NOTES,
    title="one step",
)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Anything at all, on a grid of 1 µs."""
    num_ranks = draw(st.integers(1, 3))
    event = st.builds(
        lambda rank, lane, name, start, length, size_bytes, microbatch: Event(
            rank, lane, name, start * 1_000 * 1e-9, (start + length) * 1_000 * 1e-9, size_bytes, microbatch
        ),
        st.integers(0, num_ranks - 1),
        st.sampled_from(LANES),
        st.text(max_size=5),
        st.integers(0, 30),
        st.integers(0, 15),
        st.integers(0, 10**12),
        st.none() | st.integers(0, 9),
    )
    notes = tuple(draw(st.lists(st.text(max_size=5), max_size=2)))
    return Timeline(draw(st.lists(event, max_size=12)), num_ranks, notes, draw(st.none() | st.text(max_size=5)))


# --- the events -----------------------------------------------------------------------------------------------------


def test_events_are_in_the_order_of_their_starts_and_stay_so() -> None:
    assert [e.start_s for e in STEP.events] == sorted(e.start_s for e in STEP.events)
    assert STEP.rank(1) == tuple(e for e in STEP.events if e.rank == 1)
    assert Timeline(tuple(reversed(STEP.events)), 2, NOTES, "one step") == STEP
    assert STEP.makespan_s == 10 * MS
    assert repr(STEP) == "Timeline(2 ranks, 8 events, 10.0 ms)"
    with pytest.raises(FrozenInstanceError):
        STEP.num_ranks = 3  # type: ignore[misc]


def test_of_two_that_start_together_the_outer_comes_first() -> None:
    inner, outer = Event(0, "compute", "forward", 0, 1), Event(0, "compute", "step", 0, 2)
    assert Timeline([inner, outer], 1).events == (outer, inner)


def test_a_late_start_is_no_part_of_the_makespan() -> None:
    assert Timeline([Event(0, "wait", "recv", 2.0, 3.0)], 1).makespan_s == 1.0


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Event(2, "wait", "recv", 0, 1), "ranks 0 to 1"),
        (Event(-1, "wait", "recv", 0, 1), "ranks 0 to 1"),
        (Event(0, "send", "recv", 0, 1), "compute, message, wait"),  # type: ignore[arg-type]
        (Event(0, "wait", "recv", 1, 0), "before its start"),
        (Event(0, "wait", "recv", 0, math.nan), "before its start"),
        (Event(0, "wait", "recv", 0, math.inf), "finite"),
    ],
)
def test_impossible_events_are_refused(event: Event, message: str) -> None:
    with pytest.raises(MplabError, match=message):
        Timeline([event], 2)


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(MplabError, match="at least 1"):
        Timeline([], 0)
    with pytest.raises(MplabError, match=r"rank 2: .*0 to 1"):
        STEP.rank(2)


# --- in numbers and in words ----------------------------------------------------------------------------------------


def test_summary_of_a_step_worked_by_hand() -> None:
    first, second = STEP.summary().ranks
    assert first.busy_s == pytest.approx(8 * MS)  # the step, forward and backward once, without the wait at its end
    assert first.sending_s == pytest.approx(2 * MS)
    assert first.waiting_s == pytest.approx(1 * MS)
    assert (first.num_events, first.sent_bytes) == (5, 4096)
    assert second.busy_s == pytest.approx(2 * MS)
    assert second.sending_s == second.waiting_s == pytest.approx(4 * MS)
    assert STEP.summary().load_balance == pytest.approx(8 / 5)


@given(timelines())
def test_summary_counts_every_moment_once(timeline: Timeline) -> None:
    def moments(rank: int, lane: Lane) -> set[int]:
        spans = [(round(e.start_s * 1e6), round(e.end_s * 1e6)) for e in timeline.rank(rank) if e.lane == lane]
        return {i for start, end in spans for i in range(start, end)}

    for rank, summary in enumerate(timeline.summary().ranks):
        compute, message, wait = (moments(rank, lane) for lane in LANES)
        assert summary.busy_s == pytest.approx(len(compute - wait) * 1e-6, abs=1e-12)
        assert summary.sending_s == pytest.approx(len(message) * 1e-6, abs=1e-12)
        assert summary.waiting_s == pytest.approx(len(wait) * 1e-6, abs=1e-12)


def test_load_balance_of_idle_ranks() -> None:
    assert math.isnan(Timeline([], 2).summary().load_balance)
    assert Timeline([Event(0, "compute", "f", 0, 1)], 4).summary().load_balance == 4.0


def test_the_summary_prints_as_a_table() -> None:
    assert str(STEP.summary()) == repr(STEP.summary())
    assert str(STEP.summary()).splitlines() == [
        "rank     busy        sending        waiting        bytes sent",
        "   0  8.00 ms  80 %  2.00 ms  20 %  1.00 ms  10 %       4,096",
        "   1  2.00 ms  20 %  4.00 ms  40 %  4.00 ms  40 %         100",
        "makespan 10.0 ms, load balance L = max(busy) / mean(busy) = 1.60 (1 is perfect)",
        f"note: {NOTES[0]}",
        f"note: {NOTES[1]}",
    ]


def test_an_empty_summary_prints_too() -> None:
    assert str(Timeline([], 1).summary()).splitlines() == [
        "rank    busy     sending     waiting     bytes sent",
        "   0  0.00 s  -   0.00 s  -   0.00 s  -           0",
        "makespan 0.00 s, load balance L = max(busy) / mean(busy) = none: no rank computed",
    ]


def test_the_description_says_in_words_what_the_figure_shows() -> None:
    assert STEP.describe().splitlines() == [
        "one step: 2 ranks, 8 events, 10.0 ms.",
        "Rank 0: busy for 8.00 ms (step ×1, forward ×1, backward ×1); sending for 2.00 ms (send ×1); "
        "waiting for 1.00 ms (recv ×1); the longest wait 1.00 ms in recv, from 8.00 ms on.",
        "Rank 1: busy for 2.00 ms (forward ×1); sending for 4.00 ms (all_reduce ×1); "
        "waiting for 4.00 ms (recv ×1); the longest wait 4.00 ms in recv, from 0.00 s on.",
        "Load balance L = 1.60.",
        f"Note: {NOTES[0]}.",
        f"Note: {NOTES[1]}.",
    ]
    assert Timeline([], 1).describe().splitlines() == [
        "Timeline: 1 rank, 0 events, 0.00 s.",
        "Rank 0: busy for 0.00 s; sending for 0.00 s; waiting for 0.00 s.",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (3.21e-9, "3.21 ns"),
        (999e-9, "999 ns"),
        (999.7e-9, "1.00 µs"),
        (9.999e-9, "10.0 ns"),
        (1e-6, "1.00 µs"),
        (12.34e-3, "12.3 ms"),
        (75, "75.0 s"),
    ],
)
def test_seconds_as_people_read_them(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


@pytest.mark.parametrize(
    ("bytes_s", "text"), [(20.63e9, "20.6 GB/s"), (1e9, "1 GB/s"), (999.7e6, "1 GB/s"), (5e7, "50 MB/s")]
)
def test_bandwidths_as_people_read_them(bytes_s: float, text: str) -> None:
    assert format_bandwidth(bytes_s) == text


def test_rows_in_columns() -> None:
    rows = [["what", "n", ""], ["a", "1,000", "why"], ["long one", "2"]]
    assert columns(rows, "lrl") == "what          n\na         1,000  why\nlong one      2"
    assert columns([["1", "22", "3"], ["11", "2", "333"]]) == " 1  22    3\n11   2  333"


# --- as a file ------------------------------------------------------------------------------------------------------


@given(timelines())
def test_a_saved_timeline_loads_as_it_was(tmp_path_factory: pytest.TempPathFactory, timeline: Timeline) -> None:
    path = tmp_path_factory.mktemp("traces") / "t.json"
    timeline.save(path)
    assert Timeline.load(path) == timeline
    assert list(path.parent.iterdir()) == [path]


@given(timelines())
def test_viewers_find_every_span_beside_or_within_another(
    tmp_path_factory: pytest.TempPathFactory, timeline: Timeline
) -> None:
    path = tmp_path_factory.mktemp("traces") / "t.json"
    timeline.save(path)
    trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans = [e for e in trace if e["ph"] == "X"]
    assert len(spans) == len(timeline.events)
    for thread in {e["tid"] for e in spans}:
        ends: list[float] = []
        for span in (e for e in spans if e["tid"] == thread):  # as they stand in the file
            start, end = round(span["ts"] * 1000), round((span["ts"] + span["dur"]) * 1000)
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)


def test_the_file_names_run_ranks_lanes_and_bytes(tmp_path: Path) -> None:
    STEP.save(str(tmp_path / "t.json"))
    trace = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["pid"] for e in trace} == {1}
    names = {e["tid"]: e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    assert names == {1: "rank 0", 2: "rank 1", 3: "rank 0, overlapping 1"}
    assert [e["args"]["name"] for e in trace if e["name"] == "process_name"] == ["one step"]
    (send,) = (e for e in trace if e["name"] == "send")
    assert send == {
        "ph": "X",
        "pid": 1,
        "tid": 3,
        "ts": 3000.0,
        "dur": 2000.0,
        "cat": "message",
        "name": "send",
        "args": {"rank": 0, "bytes": 4096, "microbatch": 0},
    }


def damage(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["traceEvents"][4].pop("ts"), "damaged at trace event 4: KeyError 'ts'"),
        (lambda c: c["traceEvents"][4].update(ts="soon"), "damaged at trace event 4"),
        (lambda c: c["traceEvents"][4].update(args=None), "damaged at trace event 4"),
        (lambda c: c["traceEvents"].insert(3, 5), "damaged at trace event 3"),
        (lambda c: c["traceEvents"][4].update(dur=-1), "before its start"),
        (lambda c: c["traceEvents"][4].update(cat="kernel"), "compute, message, wait"),
        (lambda c: c["traceEvents"][4]["args"].update(rank=5), "ranks 0 to 1"),
        (lambda c: c.pop("traceEvents"), "damaged"),
        (lambda c: c["otherData"].update(num_ranks=None), "damaged"),
        (lambda c: c["otherData"].update(writer="torch"), "not written by Timeline.save"),
        (lambda c: c.pop("otherData"), "not written by Timeline.save"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "t.json"
    STEP.save(path)
    damage(path, change)
    with pytest.raises(MplabError, match=re.escape(message)) as caught:
        Timeline.load(path)
    assert "t.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"traceEvents": [', b"\xff\xfe", b"7"])
def test_another_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(MplabError, match=r"t\.json"):
        Timeline.load(tmp_path / "t.json")


def test_a_cut_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    STEP.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(MplabError, match=r"t\.json"):
            Timeline.load(path)


def test_places_that_cannot_be_read_or_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(MplabError, match=r"missing\.json cannot be read: No such file"):
        Timeline.load(tmp_path / "missing.json")
    with pytest.raises(MplabError, match=r"cannot be written to .*: No such file"):
        STEP.save(tmp_path / "no" / "folder.json")


# --- as a figure ----------------------------------------------------------------------------------------------------


def bars(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.type == "bar"]


def labels(figure: Any) -> list[str]:
    return [text for trace in figure.data if trace.type == "scatter" for text in trace.text]


def test_every_event_is_a_bar_and_lanes_differ_in_more_than_colour() -> None:
    figure = STEP.figure()
    assert sum(len(trace.x) for trace in bars(figure)) == len(STEP.events)
    hatching = {trace.name.split(":")[0]: trace.marker.pattern.shape for trace in bars(figure)}
    assert hatching == {"compute": "", "message": "/", "wait": "x"}
    assert [trace.name for trace in bars(figure)] == [
        "compute: step",
        "compute: forward",
        "compute: backward",
        "wait",
        "message",
    ]


def looks_of(*names: str) -> dict[str, tuple[str, str]]:
    figure = Timeline([Event(0, "compute", name, i, i + 1) for i, name in enumerate(names)], 1).figure()
    return {t.name.removeprefix("compute: "): (t.marker.color, t.marker.pattern.shape) for t in bars(figure)}


def test_what_is_in_every_lab_looks_the_same_in_every_figure() -> None:
    one, other = looks_of("forward", "backward", "update"), looks_of("mine", "backward", "weight gradient", "forward")
    assert len(set(one.values())) == 3
    assert len(set(other.values())) == 4
    assert all(one[name] == other[name] for name in ("forward", "backward"))
    assert looks_of("input gradient")["input gradient"] == one["backward"]
    chunks = looks_of("forward of chunk 0", "forward of chunk 1", "backward of chunk 1")
    assert chunks["forward of chunk 0"] == one["forward"]
    assert chunks["forward of chunk 1"] == (one["forward"][0], ".")
    assert chunks["backward of chunk 1"] == (one["backward"][0], ".")
    assert len(set(looks_of(*"abcdef").values())) == 4


def test_messages_and_waits_leave_the_upper_half_of_the_row_free() -> None:
    for trace in bars(STEP.figure()):
        if trace.name in ("message", "wait"):
            assert all(
                y - height / 2 == pytest.approx(round(y)) for y, height in zip(trace.y, trace.width, strict=True)
            )


def test_what_is_nested_is_lower_than_what_it_is_in() -> None:
    heights = {trace.name: trace.width for trace in bars(STEP.figure())}
    assert heights["compute: step"] == (0.8,)
    assert heights["compute: forward"] == pytest.approx((0.6, 0.8))  # in the step of rank 0, alone in rank 1
    deep = Timeline([Event(0, "compute", str(i), i, 20 - i) for i in range(9)], 1).figure()
    assert min(min(trace.width) for trace in bars(deep)) == pytest.approx(0.4)


def test_bars_and_axis_have_the_unit_that_fits() -> None:
    figure = STEP.figure()
    (forward,) = (trace for trace in bars(figure) if trace.name == "compute: forward")
    assert (forward.base, forward.x) == (pytest.approx((1, 4)), pytest.approx((3, 2)))
    assert figure.layout.xaxis.title.text == "time in ms"
    short = Timeline([replace(e, start_s=e.start_s / 1000, end_s=e.end_s / 1000) for e in STEP.events], 2).figure()
    assert short.layout.xaxis.title.text == "time in µs"
    assert short.layout.xaxis.range == pytest.approx(figure.layout.xaxis.range)


def test_labels_are_shortened_to_what_fits_and_left_out_where_nothing_does() -> None:
    def label(width: float, microbatch: int | None) -> list[str]:
        return labels(Timeline([Event(0, "compute", "forward", 0, width, 0, microbatch)], 1).figure())

    assert label(1, 3) == ["forward 3"]
    events = [Event(0, "compute", "forward", 0, width, 0, 3) for width in (0.05, 0.01)]
    scale = Event(1, "compute", "f", 0, 1)
    assert labels(Timeline([events[0], scale], 2).figure()) == ["F3", "f"]
    assert labels(Timeline([events[1], scale], 2).figure()) == ["f"]


def test_a_span_with_spans_in_it_has_no_label_that_they_would_hide() -> None:
    assert sorted(labels(STEP.figure())) == sorted(
        ["forward 0", "backward 0", "send 0", "recv", "forward 0", "recv 0", "all_reduce"]
    )


def test_a_label_moves_up_where_a_message_or_wait_lies_below_it() -> None:
    (texts,) = (trace for trace in STEP.figure().data if trace.type == "scatter")
    places = {(text, round(y)): y for text, y in zip(texts.text, texts.y, strict=True)}
    assert places["forward 0", 0] == pytest.approx(-0.2)
    assert places["forward 0", 1] == pytest.approx(1)


def test_hovering_tells_name_rank_micro_batch_bytes_and_times() -> None:
    (sent,) = (trace for trace in bars(STEP.figure()) if trace.name == "message")
    assert sent.hovertext == (
        "<b>send</b> (message, rank 0)<br>micro-batch 0<br>4,096 bytes<br>2.00 ms, from 3.00 ms",
        "<b>all_reduce</b> (message, rank 1)<br>100 bytes<br>4.00 ms, from 6.00 ms",
    )


def test_names_cannot_be_taken_for_markup() -> None:
    figure = Timeline([Event(0, "compute", "<lambda>", 0, 1)], 1, ("a < b",), "R&D").figure()
    assert labels(figure) == ["&lt;lambda&gt;"]
    assert bars(figure)[0].name == "compute: &lt;lambda&gt;"
    assert bars(figure)[0].hovertext[0].startswith("<b>&lt;lambda&gt;</b>")
    assert figure.layout.title.text == "R&amp;D"
    assert figure.layout.annotations[0].text == "a &lt; b"


def test_the_notes_stand_under_the_figure() -> None:
    (annotation,) = STEP.figure().layout.annotations
    assert annotation.text.split("<br>") == [html.escape(note) for note in NOTES]
    assert not Timeline([], 1).figure().layout.annotations


def test_a_figure_is_as_high_as_its_ranks_and_notes_need() -> None:
    def height(num_ranks: int, notes: tuple[str, ...] = ()) -> int:
        return int(Timeline([], num_ranks, notes).figure().layout.height)

    assert height(5) - height(4) == 44
    assert height(2, ("short",)) < height(2, ("long " * 40,)) < height(2, ("long " * 80,))


def test_many_events_are_few_traces() -> None:
    events = [Event(i % 4, LANES[i % 3], f"{i % 50}", i * 1e-5, (i + 1) * 1e-5) for i in range(5000)]
    figure = Timeline(events, 4).figure()
    assert len(figure.data) <= 7
    assert sum(len(trace.x) for trace in bars(figure)) == 5000
    assert len(figure.to_json()) < 2_000_000


def test_without_plotly_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MplabError, match=r"pip install .*summary"):
        STEP.figure()


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with drawing_page() as made:
        yield made


@pytest.mark.browser
@pytest.mark.parametrize("width", [600, 900])
def test_no_part_of_the_figure_meets_another_or_is_cut(page: Any, width: int) -> None:
    many = ["embedding", "attention forward", "feed forward", "backward", "optimizer step", "clip"]
    long = Timeline(
        [Event(r, "compute", name, i, i + 0.9) for r in range(8) for i, name in enumerate(many)]
        + [Event(0, "wait", "recv", 5, 7), Event(1, "message", "send", 6, 7)],
        num_ranks=8,
        notes=("8 ranks share 2 cores, which takes more than one line to say: " * 3, *NOTES),
        title="a title that goes on for so long that it needs a second line at any width that a notebook has",
    )
    for timeline in (STEP, long, replace(STEP, title=None, notes=())):
        figure = timeline.figure()
        boxes = boxes_of(page, figure, width)
        assert boxes["labels"]
        ((_, top, _, bottom),) = boxes["plot"]
        assert bottom - top == pytest.approx(44 * timeline.num_ranks, abs=1)  # less where margins are too small
