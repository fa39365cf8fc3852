"""The explorer of tensor parallelism, without a browser: what it measures, draws, says and runs."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab import Link, MplabError, World
from mplab.plan.tensor import Block, BlockTime, block_flops, block_time_s, block_traffic, smallest_paying_width
from mplab.show import TensorExplorer, measure_block_speeds, tensor_times_figure
from mplab.show.tensor import HERE, LINKS, SEQUENCES, SLOW
from mplab.show.tensor_figure import PAYING_WIDTHS, WIDTHS
from mplab.show.tensor_step import (
    _ALL_REDUCES_BYTES,
    _LARGE,
    BlockRun,
    BlockSpeeds,
    _inputs,
    _times,
    median_time,
    run_block,
)
from mplab.trace import Event, Timeline
from mplab.world.machine import Machine

BLOCK = Block(1, 64, 256, 8)
FAST = Link(1e-5, 1e10)
MACHINE = Machine("A processor", 2, 0, (), "2", "3", "Linux", 0.1)
# One rank: 20 GFLOP/s and 1 ms of Python; two at once as fast, with 2 ms; four share two cores.
SPEEDS = BlockSpeeds({1: 2e10, 2: 2e10, 4: 1e10}, {1: 1e-3, 2: 2e-3, 4: 4e-3}, FAST, MACHINE)
RUN = BlockRun(
    [BlockTime(2.0, 0.0), BlockTime(1.0, 0.0), BlockTime(3.0, 0.0)],
    [BlockTime(0.5, 1.0), BlockTime(1.0, 0.25), BlockTime(0.5, 0.5)],
    8,
    262_144,
    1e-7,
)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplab.world.machine.num_cores", lambda: 2)


@pytest.fixture
def make() -> Iterator[Callable[..., TensorExplorer]]:
    made: list[TensorExplorer] = []

    def explorer(**options: Any) -> TensorExplorer:
        made.append(TensorExplorer(**{"flops_s": 1e10, "link": FAST, "num_runs": 2, "width": 64, **options}))
        return made[-1]

    yield explorer
    for explorer_ in made:
        explorer_.box.close_all()


def said(paragraph: Any) -> str:
    return html.unescape(re.sub("<[^>]*>", "", paragraph.value))


def titled(figure: Any) -> str:
    return html.unescape(figure.layout.title.text).replace("<br>", " ").replace("\xa0", " ")


def texts(figure: Any) -> str:
    return " ".join(str(annotation.text) for annotation in figure.layout.annotations)


def named(figure: Any, name: str, kind: str = "scatter") -> list[Any]:
    return [trace for trace in figure.data if trace.name == name and trace.type == kind]


def marks(figure: Any) -> list[tuple[float, float, str]]:
    """Arrows: where they point, and what they say."""
    return [(10**a.x, 10**a.y, a.text) for a in figure.layout.annotations if a.showarrow is not False]


# --- the prediction ---------------------------------------------------------------------------------------------------


def test_a_block_takes_its_python_its_flops_and_its_messages() -> None:
    assert SPEEDS.time_s(BLOCK, 1) == pytest.approx((1e-3 + block_flops(BLOCK) / 2e10, 0))
    compute_s, communication_s = SPEEDS.time_s(BLOCK, 4)
    assert compute_s == pytest.approx(4e-3 + block_flops(BLOCK, 4) / 1e10)
    assert communication_s == pytest.approx(4 * (6 * 1e-5 + 1.5 * 64 * 256 * 4 / 1e10))
    assert SPEEDS.saved_s(BLOCK, 2) == pytest.approx(block_flops(BLOCK) / 4e10 - 1e-3)
    assert SPEEDS.saved_s(Block(1, 1, 8, 8), 2) < 0


def test_an_emulated_link_makes_no_message_faster_than_this_machine_does() -> None:
    slow, faster = Link(1e-3, 1e8), Link(0.0, math.inf)
    assert SPEEDS.time_s(BLOCK, 2, slow).communication_s == pytest.approx(4 * (2e-3 + 64 * 256 * 4 / 1e8))
    assert SPEEDS.time_s(BLOCK, 2, faster) == SPEEDS.time_s(BLOCK, 2)
    assert SPEEDS.time_s(BLOCK, 2, slow).compute_s == SPEEDS.time_s(BLOCK, 2).compute_s


@pytest.mark.parametrize("link", [*LINKS, FAST])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_where_it_pays_is_what_the_plan_says(link: Link, num_ranks: int) -> None:
    counts = (1, num_ranks)
    speeds = BlockSpeeds(dict.fromkeys(counts, 2e10), dict.fromkeys(counts, 0.0), Link(0.0, math.inf))
    found = speeds.smallest_paying_width(BLOCK, num_ranks, link, PAYING_WIDTHS)
    assert found == smallest_paying_width(BLOCK, num_ranks, 2e10, link, PAYING_WIDTHS)


def test_python_moves_where_it_pays() -> None:
    found = SPEEDS.smallest_paying_width(BLOCK, 2, None, reversed(PAYING_WIDTHS))
    assert found is not None
    assert found > PAYING_WIDTHS[0]
    for width, pays in ((found, True), (found - 32, False)):
        wide = replace(BLOCK, width=width)
        assert (SPEEDS.time_s(wide, 2).total_s < SPEEDS.time_s(wide, 1).total_s) is pays
    assert SPEEDS.smallest_paying_width(BLOCK, 2, Link(10, 1e6), PAYING_WIDTHS) is None


# --- what is measured at the start ------------------------------------------------------------------------------------


def test_what_is_given_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "run", lambda *args: pytest.fail("a world ran"))
    speeds = measure_block_speeds(8, flops_s=1e10, link=FAST)
    assert speeds.flops_s == {1: 1e10, 2: 1e10, 4: 5e9, 8: 2.5e9}, "two cores are shared"
    assert set(speeds.python_s.values()) == {0.0}
    assert speeds.link == FAST


def test_python_is_what_a_tiny_block_takes_and_flops_the_rest_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = {1: 1, 2: 1, 4: 3}
    monkeypatch.setattr(
        "mplab.show.tensor_step._compute", lambda rank: ((1 + rank.index) * 1e-3, (5 + rank.index) * slower[rank.size])
    )
    speeds = measure_block_speeds(4, link=FAST)
    assert speeds.python_s == pytest.approx({1: 1e-3, 2: 2e-3, 4: 4e-3}), "of the slowest rank"
    large = block_flops(_LARGE)
    expected = {1: large / (5 - 1e-3), 2: large / (6 - 2e-3), 4: large / (24 - 4e-3)}
    assert speeds.flops_s == pytest.approx(expected)


def test_a_tiny_block_that_was_disturbed_leaves_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplab.show.tensor_step._compute", lambda rank: (7.0, 5.0))
    speeds = measure_block_speeds(2, link=FAST)
    assert speeds.python_s[2] == pytest.approx(4.5)
    assert speeds.flops_s[2] == pytest.approx(block_flops(_LARGE) / 0.5)


def test_the_link_is_the_one_that_explains_the_all_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(2e-5, 3e9)
    times_s = [2 * link.time_s(1, size // 2) for size in _ALL_REDUCES_BYTES]
    monkeypatch.setattr("mplab.show.tensor_step._all_reduce", lambda rank: times_s)
    found = measure_block_speeds(2, flops_s=1e10).link
    assert (found.latency_s, found.bandwidth_bytes_s) == (pytest.approx(2e-5), pytest.approx(3e9))


def test_it_is_really_measured() -> None:
    speeds = measure_block_speeds(2)
    assert speeds.flops_s.keys() == speeds.python_s.keys() == {1, 2}
    assert min(*speeds.flops_s.values(), *speeds.python_s.values()) > 0
    assert speeds.link.time_s(1, 1 << 20) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size_max": 1}, "world_size_max=1: give 2 to 8"),
        ({"world_size_max": 9}, "world_size_max=9: give 2 to 8"),
        ({"flops_s": 0}, "flops_s=0: give more than 0"),
    ],
)
def test_speeds_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MplabError, match=message):
        measure_block_speeds(**options)


# --- what really runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "num_runs"), [(2, 3), (4, 1)])
def test_a_cut_block_gives_what_the_whole_one_gives_and_sends_what_was_predicted(num_ranks: int, num_runs: int) -> None:
    block = Block(2, 8, 32, 8)
    run = run_block(block, num_ranks, None, num_runs)
    assert run[2:4] == block_traffic(block, num_ranks, 0)[:2]
    assert 0 < run.difference < 1e-5, "sums in another order"
    assert len(run.serial) == len(run.parallel) == num_runs
    assert all(taken.compute_s > 0 and taken.communication_s == 0 for taken in run.serial)
    assert all(taken.compute_s > 0 and taken.communication_s > 0 for taken in run.parallel)


def test_what_enters_a_block_needs_a_gradient_as_after_another_block() -> None:
    (x, gradient), (again, _) = _inputs(BLOCK), _inputs(BLOCK)
    assert x.requires_grad
    assert not gradient.requires_grad
    assert x.shape == gradient.shape == (1, 64, 256)
    assert torch.equal(x, again), "the whole block and the cut one get the same"


def test_another_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"mlp.up": "column", "mlp.down": "row"}
    monkeypatch.setattr("mplab.show.tensor_step.PLAN", plan)
    block = Block(1, 4, 16, 8)
    assert run_block(block, 2, None, 1).num_messages == 4, "the attention is whole"

    def spoilt(*args: Any) -> Any:
        output = forward(*args)
        return output + 1 if args[0].size > 1 else output

    from mplab.show import tensor_step

    forward = tensor_step._forward_and_backward
    monkeypatch.setattr(tensor_step, "_forward_and_backward", spoilt)
    assert run_block(block, 2, None, 1).difference == pytest.approx(1, rel=1e-3)


def test_the_link_is_emulated_while_blocks_are_timed_alone() -> None:
    """Not a judgement of speed: messages are held back, so less would be a wrong clock or a lost message."""
    block, link = Block(1, 2, 16, 8), Link(5e-3, 1e6)
    run = run_block(block, 2, link, 2)
    predicted_s = block_time_s(block, 2, 1e9, link).communication_s
    assert min(taken.communication_s for taken in run.parallel) >= 0.99 * predicted_s
    # The weights, 13 kB, reach the other rank without it: over it they would take as long as two blocks more.
    assert max(taken.communication_s for taken in run.serial) == 0


def test_messages_and_waits_of_a_block_by_hand() -> None:
    block = "block"
    events = [
        *(Event(r, "compute", block, 0, 1) for r in range(2)),  # the first does not count
        Event(0, "message", "a", 0.1, 0.9),
        Event(0, "compute", block, 10, 16),
        Event(1, "compute", block, 11, 18),
        Event(0, "wait", "a", 11, 14),
        Event(0, "message", "a", 13, 15),  # 4 s of rank 0, the overlap once
        Event(1, "message", "a", 13, 15),
        Event(1, "wait", "barrier", 18.5, 19),  # between two blocks
        Event(0, "compute", block, 20, 21),
        Event(1, "compute", block, 20, 23),
    ]
    world: Any = SimpleNamespace(size=2, timeline=Timeline(sorted(events, key=lambda e: e.start_s), 2))
    assert _times(world) == [pytest.approx((8 - 3, 3)), pytest.approx((3, 0))]


def test_the_median_is_one_of_the_times() -> None:
    times = [BlockTime(3, 0), BlockTime(0, 1), BlockTime(1, 1)]
    assert median_time(times) == (1, 1)
    assert median_time([*times, BlockTime(9, 9)]) == (1, 1), "of an even number the shorter"
    assert median_time(RUN.parallel) == (1.0, 0.25)


# --- the figure -------------------------------------------------------------------------------------------------------


def test_lines_over_the_width() -> None:
    figure = tensor_times_figure(BLOCK, 2, SPEEDS, SLOW)
    blocks = [replace(BLOCK, width=width) for width in WIDTHS]
    (saved,) = named(figure, "computing saved")
    expected = [SPEEDS.saved_s(block, 2) for block in blocks]
    assert saved.x == WIDTHS
    assert list(saved.y) == [pytest.approx(t) if t > 0 else None for t in expected]
    assert None in saved.y, "at the smallest width Python costs more than is saved"
    for name, link in (("messages, this machine", None), ("messages, 1 ms, 100 MB/s", SLOW)):
        (line,) = named(figure, name)
        assert line.y == pytest.approx([SPEEDS.time_s(block, 2, link).communication_s for block in blocks])
        assert line.hovertext[0].startswith("width 64: ")
    lines = figure.data[:3]
    assert len({line.line.dash for line in lines}) == len({line.marker.symbol for line in lines}) == 3, "without colour"
    (chosen,) = named(figure, "your width")
    assert chosen.x == (256, 256)
    assert chosen.y == pytest.approx((SPEEDS.saved_s(BLOCK, 2), SPEEDS.time_s(BLOCK, 2, SLOW).communication_s))


def test_where_it_begins_to_pay_is_marked_on_the_line_of_each_link() -> None:
    figure = tensor_times_figure(BLOCK, 2, SPEEDS, SLOW)
    expected = []
    for link in (None, SLOW):
        width = SPEEDS.smallest_paying_width(BLOCK, 2, link, PAYING_WIDTHS)
        assert width is not None
        seconds = SPEEDS.time_s(replace(BLOCK, width=width), 2, link).communication_s
        expected.append((pytest.approx(width), pytest.approx(seconds), f"pays from {width} on"))
    assert marks(figure) == expected
    assert expected[0] != expected[1]
    assert f"2 ranks {expected[1][2].replace('pays from', 'pay from width')}: 64 tokens, 1 ms" in titled(figure)


def test_where_it_never_pays_there_is_no_mark() -> None:
    figure = tensor_times_figure(BLOCK, 2, SPEEDS, Link(1.0, 1e6))
    assert len(marks(figure)) == 1, "only that of this machine's link"
    assert titled(figure).startswith("2 ranks pay at no width up to 2048: 64 tokens")
    alone = tensor_times_figure(BLOCK, 2, SPEEDS)
    assert len(marks(alone)) == 1
    assert titled(alone).endswith("on: 64 tokens, this machine's link")


def test_what_is_lost_has_no_place_on_the_line() -> None:
    slower = BlockSpeeds({1: 1e9, 2: 2e8}, {1: 0.0, 2: 0.0}, FAST, MACHINE)
    figure = tensor_times_figure(BLOCK, 2, slower, SLOW)
    assert named(figure, "computing saved")[0].y == (None,) * len(WIDTHS)
    assert named(figure, "your width")[0].y[0] is None
    assert marks(figure) == []
    low, high = figure.layout.yaxis.range
    assert low < math.log10(4 * 2e-5) < high


def test_a_link_that_takes_no_time_can_be_drawn() -> None:
    figure = tensor_times_figure(BLOCK, 2, replace(SPEEDS, link=Link(0.0, math.inf)))
    assert set(named(figure, "messages, this machine")[0].y) == {1e-9}
    assert "1/β any bandwidth" in texts(figure)


def bars(figure: Any) -> list[tuple[str, list[tuple[float, float, float]]]]:
    """Of every set of bars its name, and where each begins, how long it is, and its row."""
    return [
        (trace.name, list(zip(trace.base, trace.x, trace.y, strict=True)))
        for trace in figure.data
        if trace.type == "bar"
    ]


def test_one_block_in_bars_predicted_above_measured() -> None:
    figure = tensor_times_figure(BLOCK, 2, SPEEDS, SLOW, RUN)
    serial, parallel = SPEEDS.time_s(BLOCK, 1), SPEEDS.time_s(BLOCK, 2, SLOW)
    away = "messages, and waiting for them"
    assert bars(figure) == [
        ("compute", [(0, pytest.approx(serial.compute_s), 0.0), (0, pytest.approx(parallel.compute_s), 2.3)]),
        (
            away,
            [
                (pytest.approx(serial.compute_s), 0, 0.0),
                (pytest.approx(parallel.compute_s), pytest.approx(parallel.communication_s), 2.3),
            ],
        ),
        ("compute", [(0, 2.0, 1.0), (0, 1.0, 3.3)]),
        (away, [(2.0, 0, 1.0), (1.0, 0.25, 3.3)]),
    ]
    assert figure.layout.yaxis2.ticktext == (
        *("1 rank, predicted", "1 rank, measured", "2 ranks, predicted", "2 ranks, measured"),
    )
    low, high = figure.layout.yaxis2.range
    assert low > high, "the first row is on top"
    assert figure.layout.xaxis2.range[1] > 2.0
    sums = dict(zip(figure.data[-1].y, figure.data[-1].text, strict=True))
    assert [sums[row].strip() for row in (1.0, 3.3)] == ["<b>2.00 s</b>", "<b>1.25 s</b>"]
    assert "not measured yet" not in str(sums)
    looks = [trace.marker for trace in figure.data if trace.type == "bar"]
    assert looks[0].pattern.shape != looks[1].pattern.shape, "told apart without colour"
    assert looks[0].color != looks[2].color


def test_before_a_run_the_rows_of_what_is_measured_say_so() -> None:
    figure = tensor_times_figure(BLOCK, 2, SPEEDS, SLOW)
    assert [bar for _, bar in bars(figure)][2:] == [[], []]
    assert bars(figure)[0][1][0][1] == pytest.approx(SPEEDS.time_s(BLOCK, 1).compute_s * 1e3)
    assert figure.layout.xaxis2.title.text.endswith("in ms")
    sums = dict(zip(figure.data[-1].y, figure.data[-1].text, strict=True))
    assert [sums[row].strip() for row in (1.0, 3.3)] == ["not measured yet"] * 2


def test_every_figure_says_the_machine_and_who_shares_it() -> None:
    shared = texts(tensor_times_figure(BLOCK, 4, SPEEDS, SLOW))
    assert "4 ranks share 2 cores: times are not speed-ups" in shared
    assert "emulated link: 1 ms, 100 MB/s" in shared
    own = texts(tensor_times_figure(BLOCK, 2, SPEEDS)).replace("<br>", " ")
    assert (
        "this machine: A processor, 2 cores; 1 rank: 20.0 GFLOP/s and 1.00 ms of Python a block; each of 2 at once: "
        "20.0 GFLOP/s and 2.00 ms of Python a block; messages: α 10.0 µs, 1/β 10.0 GB/s 2 ranks, a core each messages "
        "go through memory"
    ) in own
    busy = replace(SPEEDS, machine=replace(MACHINE, load=3.5))
    assert "the load was 3.5: idle, it is faster" in texts(tensor_times_figure(BLOCK, 2, busy)).replace("<br>", " ")


def test_every_figure_has_as_many_traces_of_the_same_kinds() -> None:
    """The widget draws one in the place of the other."""
    kinds = {
        tuple(trace.type for trace in tensor_times_figure(BLOCK, n, SPEEDS, link, run).data)
        for n in (2, 4)
        for link in (None, SLOW)
        for run in (None, RUN)
    }
    assert len(kinds) == 1


# --- the controls -----------------------------------------------------------------------------------------------------

CONTROLS = ("width", "sequence", "num_ranks", "link")


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_changes_figure_and_words(make: Callable[..., TensorExplorer], name: str) -> None:
    explorer = make(sequence=16)
    explorer.run_button.click()
    assert "really ran" in said(explorer.result)
    assert "not measured yet" not in str(explorer.figure.data)
    words = said(explorer.words)
    getattr(explorer, name).index += 1
    assert said(explorer.words) != words
    assert said(explorer.words) == explorer.describe()
    assert 'role="status"' in explorer.words.value
    assert said(explorer.result) == "", "what was measured belonged to what was chosen before"
    assert "not measured yet" in str(explorer.figure.data)


def test_what_is_drawn_is_what_a_fresh_figure_would_show(make: Callable[..., TensorExplorer]) -> None:
    explorer = make(emulated=None)
    for name in (*CONTROLS, "link", "run_button", "link", "num_ranks"):
        control = getattr(explorer, name)
        if name == "run_button":
            control.click()
            run_is_drawn = "not measured yet" not in str(explorer.figure.data)
            assert run_is_drawn
            continue
        control.index = (control.index + 1) % len(control.options)
        fresh = tensor_times_figure(explorer.block, explorer.num_ranks.value, explorer.speeds, explorer.emulated)
        drawn = explorer.figure.to_dict()
        drawn["layout"].pop("autosize")
        for trace in drawn["data"]:
            trace.pop("uid", None)
        assert drawn["layout"] == fresh.to_dict()["layout"]
        assert str(drawn["data"]) == str(fresh.to_dict()["data"])


def test_the_words_say_it_all(make: Callable[..., TensorExplorer]) -> None:
    explorer = make(width=256)
    assert explorer.describe() == (
        "A block of the GPT, 64 tokens of width 256, forward and backward: 315 MFLOP on 1 rank; 157 MFLOP on each of "
        "2, and rank 0 sends 8 messages, 262,144 bytes, over an emulated link of 1 ms, 100 MB/s.\n"
        "Predicted: 31.5 ms on 1 rank, 26.4 ms on 2. Cutting it saves 15.7 ms of computing and costs 10.6 ms of "
        "messages: it pays, 2 ranks are 1.19 times as fast as one.\n"
        "With 64 tokens, 2 ranks pay from width 224 on over this link, from width 64 on over this machine's own."
    )
    explorer.link.value = HERE
    assert "bytes, over this machine's link.\n" in explorer.describe()
    assert explorer.describe().endswith("With 64 tokens, 2 ranks pay from width 64 on.")
    explorer.link.value = "5 ms, 10 MB/s"
    assert "it does not pay, 2 ranks take 2.6" in explorer.describe()


def test_nothing_saved_is_said(make: Callable[..., TensorExplorer]) -> None:
    explorer = make()
    explorer.speeds = BlockSpeeds({1: 1e9, 2: 4e8}, {1: 0.0, 2: 0.0}, FAST, MACHINE)
    assert "Cutting it saves no computing and costs " in explorer.describe()
    assert "2 ranks pay at no width up to 2048 over this link, at no width up to 2048 over" in explorer.describe()


def test_it_begins_where_it_is_told(make: Callable[..., TensorExplorer]) -> None:
    explorer = make(world_size_max=8, width=320, sequence=24, num_ranks=8, emulated=Link(3e-4, 3e8))
    assert explorer.block == Block(1, 24, 320, 8)
    assert explorer.emulated == Link(3e-4, 3e8)
    assert list(explorer.width.options) == sorted([*WIDTHS, 320])
    assert list(explorer.sequence.options) == sorted([*SEQUENCES, 24])
    assert list(explorer.num_ranks.options) == [2, 4, 8]
    links = [explorer._links[name] for name in explorer.link.options]
    assert links[0] is None
    assert links[1:] == sorted(links[1:], key=lambda link: link.time_s(1, 1 << 14)), "from the fastest on"
    assert len(links) == 2 + len(LINKS)
    assert list(make(world_size_max=3, emulated=None).num_ranks.options) == [2]


def test_every_control_has_a_name(make: Callable[..., TensorExplorer]) -> None:
    explorer = make()
    controls = [getattr(explorer, name) for name in CONTROLS]
    assert [control.description for control in controls] == ["width", "sequence", "ranks", "link"]
    assert all(control.continuous_update for control in controls)
    assert explorer.run_button.description == "Run it"


def test_the_figure_is_as_wide_as_the_page(make: Callable[..., TensorExplorer]) -> None:
    explorer = make()
    explorer.box.children[0].width_px = 640
    explorer.width.index += 1
    assert explorer.figure.layout.width == 640


def test_a_page_that_asks_late_gets_the_whole_figure(make: Callable[..., TensorExplorer]) -> None:
    explorer = make()
    data = explorer.figure.get_state()["_widget_data"]
    assert [trace["name"] for trace in data[:2]] == ["computing saved", "messages, this machine"]
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 3}, r"num_ranks=3, num_runs=2: of up to 4 ranks there are \[2, 4\]"),
        ({"num_ranks": 4, "world_size_max": 2}, r"of up to 2 ranks there are \[2\]"),
        ({"num_runs": 0}, "num_runs=0"),
        ({"width": 100}, "width 100 is not divisible by num_heads 8"),
        ({"sequence": 0}, "sequence is 0"),
        ({"world_size_max": 1}, "world_size_max=1"),
    ],
)
def test_a_wrong_start_is_refused(make: Callable[..., TensorExplorer], options: dict[str, Any], message: str) -> None:
    with pytest.raises(MplabError, match=message):
        make(**options)


# --- the button -------------------------------------------------------------------------------------------------------


def test_the_button_runs_what_was_chosen(make: Callable[..., TensorExplorer], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    explorer = make(width=256)

    def run(*args: Any) -> BlockRun:
        seen.append((*args, explorer.run_button.disabled, explorer.run_button.description))
        return RUN

    monkeypatch.setattr("mplab.show.tensor.run_block", run)
    explorer.run_button.click()
    assert seen == [(BLOCK, 2, SLOW, 2, True, "Running …")]
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run it")
    assert said(explorer.result) == (
        "It really ran, 2 times each, medians. 1 rank: 2.00 s measured (from 1.00 s to 3.00 s), 31.5 ms predicted: "
        "63.6 times as long. 2 ranks: 1.25 s measured (from 1.00 s to 1.50 s), 26.4 ms predicted: 47.4 times as long; "
        "of that, messages and waiting for them 250 ms, 10.6 ms predicted.\n"
        "Measured: it pays, 2 ranks are 1.6 times as fast as one. That is what was predicted: it pays, 2 ranks are "
        "1.19 times as fast as one.\n"
        "Rank 0 sent 8 messages, 262,144 bytes, as predicted. The outputs differ from those of the whole block by "
        "1e-07 at most."
    )
    assert bars(explorer.figure)[2] == ("compute", [(0, 2.0, 1.0), (0, 1.0, 3.3)])

    slower = RUN._replace(parallel=[BlockTime(2, 2)], serial=[BlockTime(2, 0)], sent_bytes=1)
    monkeypatch.setattr("mplab.show.tensor.run_block", lambda *args: slower)
    explorer.run_button.click()
    assert (
        "Measured: it does not pay, 2 ranks take 2 times as long as one. That is not what was predicted: it pays"
    ) in said(explorer.result)
    assert "Rank 0 sent 8 messages, 1 bytes, not as predicted." in said(explorer.result)
    level = RUN._replace(parallel=[BlockTime(1, 1.01)], serial=[BlockTime(2, 0)])
    monkeypatch.setattr("mplab.show.tensor.run_block", lambda *args: level)
    explorer.run_button.click()
    assert "Measured: 2 ranks are as fast as one. That is not what" in said(explorer.result)


def test_it_really_runs(make: Callable[..., TensorExplorer]) -> None:
    explorer = make(num_ranks=4, sequence=8, emulated=None)
    before = torch.get_rng_state()
    explorer.run_button.click()
    assert re.match(
        r"It really ran, 2 times each, medians\. 1 rank: .* measured \(from .* to .*\), .* predicted: .* times as "
        r"long\. 4 ranks: .*\nMeasured: .*\nRank 0 sent 24 messages, 12,288 bytes, as predicted\. ",
        said(explorer.result),
    )
    assert 'role="status"' in explorer.result.value
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_would_take_too_long_is_refused_in_words(make: Callable[..., TensorExplorer]) -> None:
    explorer = make(emulated=Link(1.0, 1e7))
    explorer.run_button.click()
    assert (
        "24.0 s are predicted for 3 blocks whole and as many cut, and the button stops at 10.0 s: take a faster"
    ) in said(explorer.result)
    assert 'role="alert"' in explorer.result.value
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run it")


def test_an_error_of_a_run_is_shown_and_the_explorer_stays_usable(
    make: Callable[..., TensorExplorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = make(sequence=8)

    def fails(*args: Any) -> Any:
        raise ValueError("no <b>luck</b>")

    with monkeypatch.context() as patch:
        patch.setattr("mplab.show.tensor_step._inputs", fails)
        explorer.run_button.click()
    assert said(explorer.result).startswith("ValueError: no <b>luck</b>\n(rank 0 of 1")
    assert 'role="alert"' in explorer.result.value
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run it")
    explorer.run_button.click()
    assert "really ran" in said(explorer.result)


def test_an_error_of_a_control_is_shown_too(
    make: Callable[..., TensorExplorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = make()

    def fails(*args: object) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("mplab.show.tensor.tensor_times_figure", fails)
        explorer.width.index += 1
    assert said(explorer.result) == "RuntimeError: no memory"
    explorer.width.index += 1
    assert said(explorer.result) == ""
