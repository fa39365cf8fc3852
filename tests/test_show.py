"""Figures and widgets, without a browser: what they draw, what they say, and what they do when told."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ipywidgets import HTML
from plotly.graph_objects import Bar

from mplab import Link, MplabError, World
from mplab.comm import algorithms
from mplab.plan.cost import all_reduce_times_s
from mplab.show import CollectiveExplorer, Hops, Timing, all_reduce_times, format_bytes, link_fits, time_all_reduce
from mplab.show.figures import ALGORITHM_LOOKS, LOOKS
from mplab.show.parts import pressed, run_button
from mplab.show.redraw import redraw
from mplab.world.links import fit_link

MAX_FIGURE_BYTES = 60_000


def hops_of(n: int, name: str, length: int = 16, **options: Any) -> Hops:
    world = World(n, device="cpu")
    world.run(lambda rank: algorithms.ALL_REDUCES[name](rank.comm, torch.ones(length)))
    return Hops(world.ledgers, name, **options)


def texts(figure: Any) -> str:
    return " ".join(str(annotation.text) for annotation in figure.layout.annotations)


# --- hops -------------------------------------------------------------------------------------------------------------


def test_hops_in_words() -> None:
    assert (
        str(hops_of(4, "tree"))
        == """\
tree: 4 steps, 6 messages, 384 bytes
  step 1:  1 → 0, 3 → 2 (64 bytes)
  step 2:  2 → 0 (64 bytes)
  step 3:  0 → 2 (64 bytes)
  step 4:  0 → 1, 2 → 3 (64 bytes)"""
    )
    uneven = str(hops_of(4, "ring", length=6))
    assert "  step 1:  0 → 1, 3 → 0 (4 bytes); 1 → 2, 2 → 3 (8 bytes)" in uneven


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("name", algorithms.ALL_REDUCES)
def test_the_figure_has_an_arrow_for_every_message(n: int, name: str) -> None:
    hops = hops_of(n, name)
    figure = hops.figure()
    arrows = [annotation for annotation in figure.layout.annotations if annotation.showarrow is not False]
    drawn = [(round(a.x), a.ay, a.y) for a in arrows]
    assert drawn == [(number, h.src, h.dst) for number, step in enumerate(hops.steps, start=1) for h in step]
    assert len(figure.to_json()) < MAX_FIGURE_BYTES
    assert "Steps, not seconds" in texts(figure)


def test_an_arrow_is_as_wide_as_its_bytes() -> None:
    def widths(name: str) -> set[float]:
        figure = hops_of(4, name, tensor_bytes=64).figure()
        return {a.arrowwidth for a in figure.layout.annotations if a.showarrow is not False}

    (whole,), (quarter,) = widths("naive"), widths("ring")
    assert whole > 2 * quarter


def test_collectives_leave_no_hops_to_draw() -> None:
    world = World(2, device="cpu")
    world.run(lambda rank: rank.comm.all_reduce(torch.ones(1)))
    with pytest.raises(MplabError, match="this run called all_reduce and sent nothing by `send`"):
        Hops(world.ledgers)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_link_fits_shows_measurements_lines_and_residuals() -> None:
    fits = [
        fit_link("fast", [1024, 4096, 1 << 20], [1e-5, 1.1e-5, 1e-4]),
        fit_link("slow", [1024, 4096, 1 << 20], [1e-3, 1.1e-3, 1e-2]),
    ]
    figure = link_fits(fits, notes=["2 ranks share 1 core: times are not speed-ups"])
    measured, fitted, residuals = figure.data[:3]
    assert list(measured.y) == list(fits[0].times_s)
    assert fitted.y[0] == pytest.approx(fits[0].fitted_s[0])
    assert list(residuals.y) == [100 * r for r in fits[0].residuals]
    assert residuals.yaxis == "y2"
    assert "2 ranks share 1 core" in texts(figure)
    assert len(figure.to_json()) < MAX_FIGURE_BYTES


def test_all_reduce_times_draws_predictions_and_measurements() -> None:
    link = Link(1e-3, 1e8)
    figure = all_reduce_times(link, 4, {"ring": [(4096, 7e-3), (1 << 20, 2.5e-2)]}, notes=["emulated link"])
    lines = {trace.name: trace for trace in figure.data}
    for name in ALGORITHM_LOOKS:
        trace = lines[name.replace("_", "-")]
        for size, seconds in zip(trace.x, trace.y, strict=True):
            assert seconds == all_reduce_times_s(link, 4, size)[name]
    assert list(lines["ring, measured"].y) == [7e-3, 2.5e-2]
    assert "emulated link" in texts(figure)
    assert len(figure.to_json()) < MAX_FIGURE_BYTES


def test_everything_is_told_apart_without_colour() -> None:
    for part in ("color", "dash", "symbol"):
        assert len({getattr(look, part) for look in LOOKS}) == len(LOOKS)


def test_notes_and_legend_stay_inside_of_the_figure() -> None:
    figure = all_reduce_times(Link(1e-3, 1e8), 4, notes=["word " * 60])
    num_lines = texts(figure).count("<br>") + 1
    assert num_lines > 2
    assert figure.layout.margin.b >= 52 + 15 * num_lines


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (512, "512 B"), (1024, "1 KiB"), (1 << 16, "64 KiB"), (3 << 19, "1.5 MiB")]
)
def test_format_bytes(size: int, said: str) -> None:
    assert format_bytes(size) == said


# --- timing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", algorithms.ALL_REDUCES)
def test_time_all_reduce_counts_one_run(name: str) -> None:
    from mplab.plan import cost

    timing = time_all_reduce(name, 3, 4096, num_runs=2)
    counted = list(zip(timing.num_messages, timing.sent_bytes, strict=True))
    assert counted == [cost.ALL_REDUCES[name](3, rank, 1024, 4) for rank in range(3)]
    assert len(timing.times_s) == 2
    assert min(timing.times_s) > 0


def test_an_emulated_link_takes_no_less_than_it_should() -> None:
    """Not a judgement of speed: messages are held back, so less would be a wrong clock or a lost message."""
    link = Link(2e-3, 1e7)
    timing = time_all_reduce("ring", 3, 12_000, link, num_runs=2)
    assert min(timing.times_s) >= all_reduce_times_s(link, 3, 12_000)["ring"] * 0.99
    assert any("emulated link" in note for note in timing.notes)


def test_time_all_reduce_refuses_an_unknown_algorithm() -> None:
    with pytest.raises(MplabError, match="algorithm='rign': choose one of 'naive', 'tree', 'ring'"):
        time_all_reduce("rign", 2, 64)


# --- the explorer -----------------------------------------------------------------------------------------------------


@pytest.fixture
def explorer() -> Iterator[CollectiveExplorer]:
    made = CollectiveExplorer(num_ranks=4, size_bytes=4096, latency_s=1e-4, bandwidth_bytes_s=1e9)
    yield made
    made.box.close_all()


def said(paragraph: Any) -> str:
    return html.unescape(re.sub("<[^>]*>", "", paragraph.value))


def test_it_draws_what_the_formulas_say(explorer: CollectiveExplorer) -> None:
    *lines, choice, measured = explorer.figure.data
    for name, line in zip(ALGORITHM_LOOKS, lines, strict=True):
        assert list(line.y) == [all_reduce_times_s(explorer.link, 4, size)[name] for size in line.x]
    assert (choice.x[0], choice.y[0]) == (4096, explorer.predicted_s()["ring"])
    assert len(measured.x) == 0


def move_ranks(explorer: CollectiveExplorer) -> None:
    explorer.num_ranks.value = 6


def move_size(explorer: CollectiveExplorer) -> None:
    explorer.size_bytes.index += 1


def move_latency(explorer: CollectiveExplorer) -> None:
    explorer.latency_s.index += 1


def move_bandwidth(explorer: CollectiveExplorer) -> None:
    explorer.bandwidth_bytes_s.index -= 1


def choose_tree(explorer: CollectiveExplorer) -> None:
    explorer.algorithm.value = "tree"


@pytest.mark.parametrize("move", [move_ranks, move_size, move_latency, move_bandwidth, choose_tree])
def test_every_control_changes_figure_and_words(
    explorer: CollectiveExplorer, move: Callable[[CollectiveExplorer], None]
) -> None:
    drawn, words = (
        json.dumps([trace.to_plotly_json() for trace in explorer.figure.data], default=list),
        said(explorer.words),
    )
    move(explorer)
    assert json.dumps([trace.to_plotly_json() for trace in explorer.figure.data], default=list) != drawn
    assert said(explorer.words) != words
    assert said(explorer.words) == explorer.describe()


def test_the_words_say_who_wins_and_by_how_much(explorer: CollectiveExplorer) -> None:
    times = explorer.predicted_s()
    assert "4 ranks, 4 KiB, α = 100 µs, 1/β = 1 GB/s." in explorer.describe()
    assert "Halving-doubling wins: tree, the next, takes" in explorer.describe()
    assert (
        f"Your choice, ring, takes {times['ring'] / times['halving_doubling']:.3g} times as long."
        in explorer.describe()
    )
    explorer.num_ranks.value, explorer.size_bytes.value = 6, 1 << 24
    assert "Ring wins: halving-doubling, the next, takes" in explorer.describe()
    assert "Your choice" not in explorer.describe()


def test_the_words_say_when_two_are_equal(explorer: CollectiveExplorer) -> None:
    explorer.num_ranks.value = 2
    assert "Ring and halving-doubling win, level: " in explorer.describe()


def test_the_button_runs_and_draws_what_it_measured(explorer: CollectiveExplorer) -> None:
    explorer.button.click()
    assert "ring really ran: " in said(explorer.result)
    assert "Rank 0 sent 6 messages, 6,144 bytes." in said(explorer.result)
    assert "emulated link" in said(explorer.result)
    explorer.algorithm.value = "tree"
    explorer.button.click()
    assert "tree really ran: " in said(explorer.result)
    measured = explorer.figure.data[-1]
    assert list(measured.x) == [4096, 4096]
    assert list(measured.marker.symbol) == [ALGORITHM_LOOKS["ring"].symbol, ALGORITHM_LOOKS["tree"].symbol]
    assert not explorer.button.disabled
    low, high = explorer.figure.layout.yaxis.range
    assert all(low < math.log10(y) < high for y in measured.y), "the marks are in view"


def test_what_was_measured_goes_with_its_link(explorer: CollectiveExplorer) -> None:
    explorer.button.click()
    explorer.size_bytes.index += 1
    assert len(explorer.figure.data[-1].x) == 1
    explorer.latency_s.index += 1
    assert len(explorer.figure.data[-1].x) == 0
    assert said(explorer.result) == ""


def test_a_run_that_would_take_too_long_is_refused_in_words(explorer: CollectiveExplorer) -> None:
    explorer.size_bytes.value, explorer.bandwidth_bytes_s.value = 1 << 24, 1e7
    explorer.button.click()
    assert "take a smaller tensor or a faster link" in said(explorer.result)
    assert not explorer.button.disabled


def test_an_error_is_shown_and_the_explorer_stays_usable(
    explorer: CollectiveExplorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> Timing:
        raise ValueError("no <b>luck</b>")

    with monkeypatch.context() as patch:
        patch.setattr("mplab.show.widgets.time_all_reduce", fails)
        explorer.button.click()
    assert said(explorer.result) == "ValueError: no <b>luck</b>"
    assert 'role="alert"' in explorer.result.value
    assert (explorer.button.disabled, explorer.button.description) == (False, "Run it")
    explorer.button.click()
    assert "really ran" in said(explorer.result)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, ""),
        (ValueError("no luck"), "ValueError: no luck"),
        (KeyboardInterrupt(), "Interrupted before it was done: what is drawn is what was there before."),
    ],
)
def test_a_pressed_button_can_be_pressed_again_whatever_happens(error: BaseException | None, message: str) -> None:
    result, button = HTML(), run_button("Run", "Runs it")
    with pressed(button, result):
        assert (button.disabled, button.description) == (True, "Running …")
        if error is not None:
            raise error
    assert (button.disabled, button.description) == (False, "Run")
    assert said(result) == message
    with pytest.raises(SystemExit), pressed(button, result):
        raise SystemExit  # a kernel that shuts down
    assert not button.disabled


def test_a_redraw_sets_what_differs_and_nothing_else() -> None:
    class Place(dict[str, Any]):
        def __setitem__(self, name: str, value: Any) -> None:
            was_set.append(name)
            super().__setitem__(name, value)

    was_set: list[str] = []
    bar = Bar(x=[1, 2], text=["a", "b"], marker={"color": "red"})
    place = Place(x=bar.x, text=bar.text, marker=bar.marker, name=None)
    redraw(place, {"x": [1, 2], "text": ["a", "c"], "marker": {"color": "red"}, "name": None})
    assert was_set == ["text"]
    redraw(place, {"x": [1], "text": ["a", "c"], "marker": {"color": "blue"}, "name": "c"})
    assert was_set == ["text", "x", "marker", "name"]


def test_every_control_has_a_name_and_the_sliders_move_while_dragged(explorer: CollectiveExplorer) -> None:
    sliders = (explorer.num_ranks, explorer.size_bytes, explorer.latency_s, explorer.bandwidth_bytes_s)
    assert all(control.description for control in (*sliders, explorer.algorithm, explorer.button))
    assert all(slider.continuous_update for slider in sliders)


def test_a_notebook_shows_it_as_a_widget(explorer: CollectiveExplorer) -> None:
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_a_page_that_asks_late_gets_the_whole_figure(explorer: CollectiveExplorer) -> None:
    """Voila takes the state of a widget after its cell has run: markers that were added to it were missing there."""
    state = explorer.figure.get_state()
    assert [trace["name"] for trace in state["_widget_data"]] == [trace.name for trace in explorer.figure.data]
    assert list(state["_widget_data"][-2]["x"]) == [4096]
    assert "over 4 ranks" in state["_widget_layout"]["title"]["text"]


@pytest.mark.parametrize("options", [{"num_ranks": 9}, {"num_ranks": 1}, {"algorithm": "rign"}])
def test_a_wrong_start_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MplabError):
        CollectiveExplorer(**options)


def test_a_start_between_two_steps_takes_the_nearest() -> None:
    explorer = CollectiveExplorer(size_bytes=5000, latency_s=4e-5, bandwidth_bytes_s=9e11)
    assert explorer.size_bytes.value == 4096
    assert explorer.link == Link(5e-5, 1e11)
    explorer.box.close_all()
