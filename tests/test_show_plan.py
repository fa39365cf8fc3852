"""Plans drawn, without a browser: the mesh, the predicted step, bars, all plans at once, and the explorer of them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab import Link, Mesh, MplabError, Plan, World
from mplab.models import GPT, GPTConfig
from mplab.parallel import Serial
from mplab.plan.machines import MACHINES, Machine
from mplab.plan.predict import Prediction
from mplab.plan.search import candidates, predict, search
from mplab.plan.transformer import GPT3, Transformer
from mplab.plan.zero import Memory
from mplab.show import PlanExplorer, mesh_figure, mesh_words, plans_figure, plans_table
from mplab.show.mesh_figure import AXIS_LOOKS
from mplab.show.plan_controls import GPT3_NAME, HERE, LAB
from mplab.show.plan_figure import _LOOKS, MEMORY_PARTS, PARTS, MeasuredParts, plan_figure, redraw_plan
from mplab.show.plan_run import PlanRun, a_batch, measured_machine, measured_parts, run_plan, sizes_of
from mplab.show.plan_timeline import layer_times, predicted_step
from mplab.show.plan_words import run_words
from mplab.trace import Event, Timeline
from mplab.world.described import CALIBRATION

CONFIG = GPTConfig(32, 8, 2, 2, 16)
SIZES = sizes_of(CONFIG)
BATCH = 8
CORES = Machine(
    "2 cores", 2, 1e9, 4e9, 1e10, Link(1e-5, 1e9), launch_s=1e-4, call_s=2e-5, update_launch_s=1e-5, source="made up"
)
CLUSTER = MACHINES["64 x 8 H100"]
Probed = make_dataclass("Probed", ["gpus"], frozen=True)
RUN_WORDS = re.compile(
    r"3 steps really ran, the first to warm up\. Median step: .* measured \(from .* to .*\), .* predicted: .* times as "
    r"long\.\nComputing .* measured, .* predicted; messages and waiting .*, .* predicted; update .*, .* predicted; "
    r"means of the ranks\.\nThe loss went from \d\.\d{4} to \d\.\d{4}, as on one rank alone: the losses differ by "
)


@pytest.fixture
def make() -> Iterator[Callable[..., PlanExplorer]]:
    made: list[PlanExplorer] = []

    def explorer(**options: Any) -> PlanExplorer:
        settings = {"config": CONFIG, "batch_size": BATCH, "num_steps": 2, "machine": CORES}
        made.append(PlanExplorer(**{**settings, **options}))
        return made[-1]

    yield explorer
    for explorer_ in made:
        explorer_.box.close_all()


def said(paragraph: Any) -> str:
    return html.unescape(re.sub("<[^>]*>", "", paragraph.value))


def texts(figure: Any) -> str:
    return " ".join(str(annotation.text) for annotation in figure.layout.annotations).replace("<br>", " ")


def content(figure: Any) -> str:
    """All that is drawn; a widget has a name of its own and fits itself into the page."""
    drawn = figure.to_dict()
    for part in ("autosize", "width"):
        drawn["layout"].pop(part, None)
    for trace in drawn["data"]:
        trace.pop("uid", None)
        if trace.get("visible"):
            trace.pop("visible")
    return json.dumps(drawn, default=list, sort_keys=True)


def predicted(plan: Plan, machine: Machine = CORES, model: Transformer = SIZES, batch: int = BATCH) -> Prediction:
    ranks = machine.with_ranks(plan.num_ranks) if machine is CORES else machine
    return predict(plan, model, batch, ranks)


# --- the predicted step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_step_that_is_drawn_is_the_one_that_was_predicted(num_ranks: int) -> None:
    machine, num_plans = CORES.with_ranks(num_ranks), 0
    for plan in candidates(SIZES, machine, BATCH):
        prediction = predicted(plan)
        step = predicted_step(prediction, SIZES, BATCH, machine)
        assert step.timeline.makespan_s == pytest.approx(prediction.step_s, rel=1e-9), str(plan)
        assert step.rows == [f"rank {r}" for r in range(num_ranks)]
        assert step.num_microbatches == plan.num_microbatches
        for name, size_bytes in (("tensor axis", prediction.tensor_bytes), ("data axis", prediction.data_bytes)):
            sent = [sum(e.size_bytes for e in step.timeline.rank(r) if e.name == name) for r in range(num_ranks)]
            assert max(sent) == size_bytes, f"{plan}: {name}"
        num_plans += 1
    assert num_plans > 3


def test_messages_on_the_tensor_axis_are_inside_of_the_action_that_sends_them() -> None:
    plan = Plan(pp=2, tp=2, num_microbatches=2, schedule="zero_bubble", recompute=True)
    timeline = predicted_step(predicted(plan), SIZES, BATCH, CORES.with_ranks(4)).timeline
    for rank in range(4):
        actions = [e for e in timeline.rank(rank) if e.lane == "compute"]
        for message in (e for e in timeline.rank(rank) if e.name == "tensor axis"):
            around = [a for a in actions if a.start_s <= message.start_s + 1e-12 and message.end_s <= a.end_s + 1e-12]
            assert [a.name for a in around] != ["weight gradient"]
            assert around[0].microbatch == message.microbatch
        assert [e for e in timeline.rank(rank) if e.name == "pipeline axis"], "tied weights"
        waits = [e.name for e in timeline.rank(rank) if e.lane == "wait"]
        assert set(waits) <= {"recv"}
    forward = next(e for e in timeline.rank(0) if e.name == "forward")
    inside = [e for e in timeline.rank(0) if e.lane == "message" and e.end_s <= forward.end_s and e.microbatch == 0]
    assert len([e for e in inside if e.name == "tensor axis"]) == 2, "the embedding and a block"
    events = predicted_step(predicted(Plan(tp=2)), SIZES, BATCH, CORES).timeline.rank(0)
    backward = next(e for e in events if e.name == "backward")
    last_s = max(e.end_s for e in events if e.name == "tensor axis")
    assert last_s == pytest.approx(backward.end_s - 2e-4 / 3), "the embedding comes last, and sends nothing back"


def test_of_very_many_messages_one_for_each_action_is_drawn() -> None:
    model = Transformer(32, 8, 6, 8, 16)
    machine = replace(CORES, num_devices=8)
    for num_microbatches, num_messages in ((2, 2 * (8 + 7)), (16, 2 * 16)):
        plan = Plan(tp=8, num_microbatches=num_microbatches)
        prediction = predict(plan, model, 16, machine)
        step = predicted_step(prediction, model, 16, machine)
        messages = [e for e in step.timeline.rank(3) if e.name == "tensor axis"]
        assert len(messages) == num_messages
        assert sum(e.size_bytes for e in messages) == prediction.tensor_bytes
        assert step.timeline.makespan_s == pytest.approx(prediction.step_s, rel=1e-9)


def test_of_many_ranks_the_stages_of_one_replica_are_drawn() -> None:
    plan = Plan(dp=4, pp=16, tp=8, num_microbatches=64, sequence_parallel=True)
    prediction = predicted(plan, CLUSTER, GPT3, 1536)
    step = predicted_step(prediction, GPT3, 1536, CLUSTER)
    assert step.rows == [f"rank {16 * p}" for p in range(8)], "every other stage"
    assert step.num_microbatches == 6
    assert "drawn: 8 of 16 stages of one replica, of each one rank; all 512 ranks do alike" in step.timeline.notes
    assert "drawn: 6 of 64 micro-batches; the time above is that of all" in step.timeline.notes
    assert {e.microbatch for e in step.timeline.events} == {*range(6), None}
    assert step.timeline.num_ranks == 8
    data = [e for e in step.timeline.events if e.name == "data axis"]
    assert [e.duration_s for e in data] == pytest.approx([prediction.data_s] * 8)
    few = predicted_step(predicted(Plan(dp=64, tp=8), CLUSTER, GPT3, 1536), GPT3, 1536, CLUSTER)
    assert few.rows == ["rank 0"]


def test_what_the_times_cannot_prove_is_said() -> None:
    def notes(plan: Plan) -> str:
        return " ".join(predicted_step(predicted(plan), SIZES, BATCH, CORES.with_ranks(plan.num_ranks)).timeline.notes)

    assert "4 ranks share 2 cores: times are not speed-ups" in notes(Plan(dp=4))
    assert "speed-ups" not in notes(Plan(dp=2))
    assert "data axis: what computing does not hide" in notes(Plan(dp=2, zero=3))
    assert "data axis" not in notes(Plan(dp=2, zero=1))
    assert "update: what other ranks' computing does not hide" in notes(Plan(pp=2))
    assert "predicted, not measured" in notes(Plan())


def test_layers_take_what_the_prediction_adds_up() -> None:
    for plan in (Plan(tp=2, num_microbatches=2), Plan(dp=2, pp=2, num_microbatches=2, recompute=True)):
        machine, prediction = CORES.with_ranks(plan.num_ranks), predicted(plan)
        layers = layer_times(plan, SIZES, BATCH, machine)
        assert len(layers) == SIZES.num_layers + 2
        share = plan.num_microbatches * machine.ranks_per_device / plan.pp
        assert share * sum(t.forward_s + t.backward_s for t in layers) == pytest.approx(prediction.compute_s)
        assert share * sum(t.forward_sent_s + t.backward_sent_s for t in layers) == pytest.approx(prediction.tensor_s)


# --- the bars ---------------------------------------------------------------------------------------------------------

PREDICTION = Prediction(
    Plan(dp=2), 10e-3, 2e-3, 3e-3, 1e-3, 4e-3, 5e-3, 1, 2, 3, Memory(10_000_000, 20_000_000, 5_000_000, 5_000_000), True
)
MEASURED = MeasuredParts(20e-3, 25e-3, 5e-3)


def bars(figure: Any, axis: str, row: float) -> dict[str, tuple[float, float]]:
    """(from, length) of each."""
    own = [t for t in figure.data if t.type == "bar" and (t.xaxis or "x") == axis and t.y[0] == row]
    return {t.name: (t.base[0], t.x[0]) for t in own}


def test_bars_stand_end_to_end_and_are_as_long_as_what_they_stand_for() -> None:
    figure = plan_figure(PREDICTION, replace(CORES, memory_bytes=100e6), MEASURED)
    memory = bars(figure, "x", 0)
    assert memory == {
        "parameters": (0, 10),
        "gradients": (10, 20),
        "optimizer": (30, 5),
        "activations": (35, 5),
    }
    lengths = [10, 2, 3, 1, 4, 5]
    starts = [0, 10, 12, 15, 16, 20]
    step = bars(figure, "x2", 0)
    assert tuple(step) == PARTS
    assert [start for start, _ in step.values()] == pytest.approx(starts)
    assert [length for _, length in step.values()] == pytest.approx(lengths)
    assert [round(length) for _, length in bars(figure, "x2", 1).values()] == [20, 25, 5]
    assert [t.text for t in figure.data if t.type == "scatter"] == [
        ("  <b>40.0 MB</b>",),
        ("  <b>25.0 ms</b>", "  <b>50.0 ms</b>"),
    ]
    assert figure.layout.title.text == "25.0 ms a step; 40.0 MB a rank: fits"
    assert (figure.layout.xaxis.title.text, figure.layout.xaxis2.title.text) == (
        "memory of the rank that holds the most, in MB",
        "one step: time in ms",
    )


@pytest.mark.parametrize(
    ("has_bytes", "at", "said"),
    [
        (50e6, 50, "a rank has 50.0 MB"),
        (20e6, 20, "a rank has 20.0 MB"),
        (400e6, None, "a rank has 400 MB, 10 times as much →"),
        (400e9, None, "a rank has 400 GB, 10,000 times as much →"),
    ],
)
def test_the_memory_of_a_rank_is_a_line_or_far_away(has_bytes: float, at: float | None, said: str) -> None:
    figure = plan_figure(PREDICTION, replace(CORES, memory_bytes=has_bytes))
    line, (_, end) = figure.layout.shapes[0], figure.layout.xaxis.range
    assert figure.layout.annotations[0].text == said
    assert end > 40
    if at is None:
        assert line.opacity == 0
        assert end < 100, "the bars are not dwarfed by what is far away"
    else:
        assert (line.x0, line.x1, line.opacity) == (at, at, 1)
        assert at < end
    assert figure.layout.annotations[0].xanchor == ("left" if at == 20 else "right"), "within the axes"


def test_what_does_not_fit_or_was_not_measured_is_said() -> None:
    figure = plan_figure(replace(PREDICTION, fits=False), CORES.with_ranks(4), None, "not <here>")
    assert figure.layout.title.text.endswith("a rank: does not fit")
    assert figure.data[-1].text[1] == "  not <here>"
    assert "4 ranks share 2 of them: times are not speed-ups made up" in texts(figure)
    said = "100 µs to launch a layer, 20.0 µs to launch a collective, 10.0 µs to launch an update; link 10.0 µs latency"
    assert f"2 cores: 1.00 GFLOP/s a device, {said}, 1 GB/s" in texts(figure)
    assert "between hosts 8.00 µs latency, 50 GB/s" in texts(plan_figure(PREDICTION, CLUSTER))


@pytest.mark.parametrize("measured", [None, MEASURED])
def test_a_figure_that_is_drawn_again_is_the_one_that_is_drawn_anew(measured: MeasuredParts | None) -> None:
    other = predicted(Plan(dp=64, tp=8, zero=1), CLUSTER, GPT3, 1536)
    figure = plan_figure(other, CLUSTER, MEASURED)
    redraw_plan(figure, PREDICTION, CORES, measured)
    assert content(figure) == content(plan_figure(PREDICTION, CORES, measured))


def test_bars_are_told_apart_without_colour() -> None:
    for names in (MEMORY_PARTS, PARTS):
        assert len({_LOOKS[name].hatching for name in names}) == len(names)
    figure = plan_figure(PREDICTION, CORES, MEASURED)
    assert all(t.marker.pattern.shape == _LOOKS[t.name].hatching for t in figure.data if t.type == "bar")
    legend = [t.name for t in figure.data if t.type == "bar" and t.showlegend]
    assert legend == [*MEMORY_PARTS, *PARTS]


# --- the mesh ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 1, 1), (2, 2, 2), (4, 1, 1), (1, 4, 2), (2, 3, 4)])
def test_the_mesh_has_all_ranks_and_a_line_between_neighbours_of_a_group(dp: int, pp: int, tp: int) -> None:
    mesh, figure = Mesh(dp, pp, tp), mesh_figure(Plan(dp, pp, tp))
    ranks = next(t for t in figure.data if t.mode == "markers+text")
    assert sorted(map(int, ranks.text)) == list(range(mesh.size))
    places = dict(zip(map(int, ranks.text), zip(ranks.x, ranks.y, strict=True), strict=True))
    assert len(set(places.values())) == mesh.size
    for axis, look in AXIS_LOOKS.items():
        wanted = {(places[a], places[b]) for group in mesh.groups(axis) for a, b in pairwise(group)}
        lines = [t for t in figure.data if t.name == f"{look.name} axis"]
        assert len(lines) == (len(mesh.groups(axis)[0]) > 1)
        drawn = set()
        for line in lines:
            points = list(zip(line.x, line.y, strict=True))
            while points:
                end = points.index((None, None))
                drawn.add((points[0], points[end - 1]))
                points = points[end + 1 :]
        assert drawn == wanted
    assert texts(figure).count("replica") >= dp
    for rank, hover in zip(map(int, ranks.text), ranks.hovertext, strict=True):
        for axis, look in AXIS_LOOKS.items():
            group = next(group for group in mesh.groups(axis) if rank in group)
            assert (f"{look.name} axis: ranks {group}" in hover) == (len(group) > 1)


def test_axes_are_told_apart_without_colour() -> None:
    looks = AXIS_LOOKS.values()
    assert len({look.dash for look in looks}) == len({look.color for look in looks}) == 3
    figure = mesh_figure(Plan(2, 2, 2))
    assert [t.name for t in figure.data if t.showlegend is not False] == ["tensor axis", "pipeline axis", "data axis"]


def test_of_a_large_mesh_a_part_is_drawn_and_said() -> None:
    figure = mesh_figure(Plan(dp=8, pp=16, tp=8))
    assert len(next(t for t in figure.data if t.mode == "markers+text").text) == 2 * 8 * 8
    assert "drawn: 2 of 8 replicas, 8 of 16 stages" in texts(figure)
    assert "drawn" not in texts(mesh_figure(Plan(2, 2, 2)))
    assert "[0, 128, … 896]" not in mesh_words(Plan(dp=8, pp=16, tp=8)), "eight are listed"
    assert "[0, 8, … 120]" in mesh_words(Plan(dp=8, pp=16, tp=8)), "sixteen are not"
    assert mesh_figure(Plan(2), title="<Two>").layout.title.text == "&lt;Two&gt;"


def test_the_mesh_in_words() -> None:
    assert mesh_words(Plan(dp=2, pp=2, tp=2)) == (
        "8 ranks: rank = (d * 2 + p) * 2 + t.\n"
        "Tensor axis, 4 groups of 2 ranks, neighbours: [0, 1], [2, 3], [4, 5], [6, 7]: each holds a part of the same "
        "layers; all-reduces in every layer, forward and backward, for every micro-batch.\n"
        "Pipeline axis, 4 groups of 2 ranks, 2 apart: [0, 2], [1, 3], [4, 6], [5, 7]: each holds other layers; a stage "
        "sends its output to the next one and gets the gradient back, for every micro-batch.\n"
        "Data axis, 4 groups of 2 ranks, 4 apart: [0, 4], [1, 5], [2, 6], [3, 7]: each holds the same part of the same "
        "stage; gradients are added up once a step (all-reduce)."
    )
    assert "Data axis: 1 rank, nothing to send." in mesh_words(Plan(tp=2))
    assert "reduce-scatters and all-gathers in every layer" in mesh_words(Plan(tp=2, sequence_parallel=True))
    said = [mesh_words(Plan(dp=2, zero=zero)).split("; ")[-1] for zero in range(4)]
    assert len(set(said)) == 4
    assert "weights are all-gathered before they are used" in said[3]
    assert "4 groups of 1" not in mesh_words(Plan(dp=4))


# --- all plans at once ------------------------------------------------------------------------------------------------


def test_every_plan_is_a_mark_with_its_spread() -> None:
    plans = [Plan(dp=2), Plan(tp=2), Plan(pp=2), Plan(dp=2, tp=2), Plan()]
    predictions = [replace(PREDICTION, plan=plan, compute_s=(i + 1) * 1e-2) for i, plan in enumerate(plans)]
    measured = {plan: [0.03 + 0.01 * i, 0.05 + 0.01 * i, 0.04 + 0.01 * i] for i, plan in enumerate(plans[:0:-1])}
    figure = plans_figure(predictions, measured, notes=["4 ranks share 2 cores"])
    marks = {t.name: t for t in figure.data if t.mode == "markers"}
    rings = {name: (*marks[name].x, *marks.pop(name).y) for name in ("first predicted", "best measured")}
    assert list(marks) == ["pipeline axis alone", "tensor axis alone", "several axes, or none"]
    assert len({t.marker.symbol for t in marks.values()}) == 3
    several = marks["several axes, or none"]
    assert list(several.x) == pytest.approx([predictions[3].step_s, predictions[4].step_s])
    assert list(several.y) == pytest.approx([0.05, 0.04])
    assert list(several.error_y.array) == pytest.approx([0.01, 0.01])
    assert list(several.error_y.arrayminus) == pytest.approx([0.01, 0.01])
    assert rings["first predicted"] == pytest.approx((predictions[1].step_s, 0.07)), "of those that were measured"
    assert rings["best measured"] == pytest.approx((predictions[4].step_s, 0.04))
    assert figure.layout.title.text.replace("<br>", " ") == "4 plans: the one predicted first takes 1.75 times the best"
    assert "first predicted: 1 x 1 x 2 ranks (dp x pp x tp): 35.0 ms predicted, 70.0 ms measured" in texts(figure)
    assert "(Spearman): -1.00" in texts(figure)
    assert "4 ranks share 2 cores" in texts(figure)
    diagonal = next(t for t in figure.data if t.mode == "lines")
    assert list(diagonal.x) == list(diagonal.y)
    low, high = (10**end for end in figure.layout.yaxis.range)
    assert low < 0.03
    assert high > 0.08


def test_one_plan_may_be_both() -> None:
    figure = plans_figure([PREDICTION], {PREDICTION.plan: [0.02]})
    rings = [t.name for t in figure.data if t.marker.color == "rgba(0, 0, 0, 0)"]
    assert rings == ["first predicted, best measured"]
    assert "Spearman" not in texts(figure)
    with pytest.raises(MplabError, match="1 predictions and 1 measured plans have no plan in common"):
        plans_figure([PREDICTION], {Plan(tp=2): [0.1]})


def test_all_plans_in_words() -> None:
    plans = [Plan(dp=2), Plan(tp=2), Plan(pp=2)]
    predictions = [replace(PREDICTION, plan=plan, compute_s=(3 - i) * 1e-2) for i, plan in enumerate(plans)]
    heading, *lines = plans_table(predictions, {Plan(dp=2): [0.03, 0.09, 0.07], Plan(pp=2): [0.02]}).splitlines()
    assert heading.split("  ")[-1] == "plan"
    assert [line.split("ranks")[0].split("  ")[-1] for line in lines] == ["1 x 2 x 1 ", "2 x 1 x 1 "], "as predicted"
    assert lines[1].split()[:9] == ["45.0", "ms", "70.0", "ms", "1.56", "30.0", "ms", "90.0", "ms"]
    with pytest.raises(MplabError, match="1 predictions and 1 measured plans have no plan in common"):
        plans_table([PREDICTION], {Plan(tp=2): [0.1]})


# --- what really runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [Plan(dp=2, tp=2), Plan(pp=2, num_microbatches=4), Plan(dp=2, zero=3)])
def test_a_run_trains_as_one_rank_does(plan: Plan) -> None:
    before = torch.get_rng_state()
    run = run_plan(plan, CONFIG, BATCH, 2)
    assert torch.equal(torch.get_rng_state(), before)
    model, batch = GPT(CONFIG), a_batch(CONFIG, BATCH)
    serial = Serial(model, torch.optim.AdamW(model.parameters()))
    losses = [serial.step(batch) for _ in range(3)]
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert run.difference == pytest.approx(max(abs(a - b) for a, b in zip(run.losses, losses, strict=True)), abs=1e-5)
    assert run.losses[-1] < run.losses[0]
    assert len(run.times_s) == 2
    assert run.step.num_ranks == plan.num_ranks
    assert max(e.end_s for e in run.step.events) == min(run.times_s), "of two the shorter"
    assert sum(run.parts) == pytest.approx(min(run.times_s))
    assert min(run.parts) > 0


def test_parts_of_a_step_by_hand() -> None:
    events = [
        Event(0, "compute", "forward", 0, 4),
        Event(0, "message", "all_reduce", 1, 2),
        Event(0, "wait", "all_reduce", 1.5, 3),
        Event(0, "compute", "update", 4, 8),
        Event(0, "wait", "all_gather_", 6, 7),
        Event(1, "compute", "forward", 0, 2),
        Event(1, "wait", "recv", 2, 6),
        Event(1, "compute", "update", 6, 10),
    ]
    assert measured_parts(Timeline(events, 2)) == ((10 - 3 - 3 + 2) / 2, (3 + 4) / 2, (3 + 4) / 2)


def test_the_batch_is_always_the_same() -> None:
    inputs, targets = a_batch(CONFIG, 3)
    assert inputs.shape == targets.shape == (3, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, a_batch(CONFIG, 3)[0])
    assert int(inputs.max()) < 32


def test_this_machine_is_as_fast_as_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Plan] = []

    def measure(model: GPT, plans: list[Plan], *how: Any) -> dict[Plan, list[float]]:
        asked[:] = plans
        return {plan: [9.0, predicted(plan).step_s, 0.0] for plan in plans}

    probed = Probed(gpus=("a GPU",))
    monkeypatch.setattr("mplab.show.plan_run.measure_plans", measure)
    monkeypatch.setattr("mplab.show.plan_run.probe", lambda: probed)
    monkeypatch.setattr(
        "mplab.show.plan_run.described",
        lambda found: replace(CORES, flops_s=7.0, launch_s=0.0, call_s=0.0, update_launch_s=len(found.gpus)),
    )
    found = measured_machine(CONFIG, BATCH)
    assert asked == [*CALIBRATION]
    assert found.flops_s == pytest.approx(1e9)
    assert (found.launch_s, found.call_s, found.update_launch_s) == pytest.approx((1e-4, 2e-5, 1e-5))
    assert found.source == "made up, and steps of training"
    measured_machine(replace(CONFIG, num_heads=1), 2)
    assert asked == [plan for plan in CALIBRATION if plan.tp == 1 and plan.num_microbatches < 3], "what can be"
    with pytest.raises(MplabError, match="two different numbers of micro-batches"):
        measured_machine(CONFIG, 1)


# --- the explorer -----------------------------------------------------------------------------------------------------


def test_it_begins_with_what_was_predicted(make: Callable[..., PlanExplorer]) -> None:
    explorer = make()
    assert explorer.plan == Plan(dp=2, tp=2)
    assert explorer.prediction == predicted(Plan(dp=2, tp=2))
    assert content(explorer.figure) == content(plan_figure(explorer.prediction, explorer.machine))
    assert "Predicted" in explorer.timeline_figure.layout.title.text
    assert explorer.describe() == said(explorer.words)
    assert 'role="status"' in explorer.words.value
    assert make(world_size_max=2).plan == Plan(dp=2)
    assert make(world_size_max=3).plan == Plan()
    assert make(plan=Plan(pp=2, cuts=(1,))).plan == Plan(pp=2, cuts=(1,))


MOVES = {
    "dp": 1,
    "tp": 1,
    "num_microbatches": 2,
    "zero": 1,
    "sequence_parallel": True,
    "recompute": True,
    "schedule": "gpipe",
}


def test_every_control_changes_figures_and_words(make: Callable[..., PlanExplorer]) -> None:
    explorer = make(plan=Plan(pp=2, tp=2, num_microbatches=4))
    moves = [
        ("dp", 1),
        ("num_microbatches", 2),
        ("schedule", "gpipe"),
        ("recompute", True),
        ("sequence_parallel", True),
    ]
    moves += [("tp", 1), ("sequence_parallel", False), ("dp", 2), ("zero", 1)]
    plan = explorer.plan
    for name, value in moves:
        if name in ("tp", "dp") and getattr(plan, name) == value:
            continue
        getattr(explorer.controls, name).value = value
        if name == "tp":
            assert "sequence_parallel with tp=1" in said(explorer.words)
            continue
        plan = explorer.plan
        assert getattr(plan, name) == value
        assert said(explorer.words) == explorer.describe()
        assert f"{plan}." in said(explorer.words)
        assert content(explorer.figure) == content(plan_figure(explorer.prediction, explorer.machine))
        assert (
            f"Predicted {explorer._step.timeline.makespan_s * 1e3:.3g}"[:13]
            in explorer.timeline_figure.layout.title.text
        )
    assert plan == Plan(dp=2, pp=2, schedule="gpipe", num_microbatches=2, zero=1, recompute=True)


def test_the_words_say_it_all(make: Callable[..., PlanExplorer]) -> None:
    explorer = make(plan=Plan(dp=2, pp=2, num_microbatches=2))
    p = explorer.prediction
    assert re.fullmatch(
        r"2 x 2 x 1 ranks \(dp x pp x tp\), 1f1b, cut by parameters, 2 micro-batches\. GPT of 2 blocks, 7,232 "
        r"parameters, 8 samples a step, 2 a micro-batch, on 2 cores\.\n"
        r"Predicted: \S+ ms a step: compute \S+ ms, pipeline \S+ \ws, data \S+ \ws, update \S+ \ws\.\n"
        r"The rank that holds the most needs \S+ kB \(parameters \S+ kB, gradients \S+ kB, optimizer \S+ kB, "
        r"activations \S+ kB\); it has 2\.00 GB\. It fits\.\n"
        r"In a step a rank sends up to \S+ kB on the pipeline axis and \S+ kB on the data axis\.\n"
        r"Stages: embedding to blocks\.0, blocks\.1 to head\.",
        explorer.describe(),
    ), explorer.describe()
    assert f"{1e3 * p.step_s:.3g} ms a step" in explorer.describe()
    explorer.plan = Plan()
    assert "Nothing is sent." in explorer.describe()
    assert "tensor" not in explorer.describe(), "no part that there is not"


REFUSALS = [
    ({"zero": 2, "pp": 2, "tp": 1}, r"zero=2 with pp=2: .* take zero=1, or pp=1"),
    ({"dp": 4}, r"4 x 1 x 2 = 8 ranks, and there are up to 4 here: choose degrees whose product is 4 or less"),
    ({"tp": 4, "dp": 1}, "tp=4 does not divide 2 heads"),
    ({"pp": 2, "dp": 1, "schedule": "interleaved", "num_microbatches": 8, "zero": 3}, "zero=3 with pp=2"),
    ({"tp": 1, "sequence_parallel": True}, "sequence_parallel with tp=1"),
    ({"dp": 4, "tp": 1, "num_microbatches": 4}, "a batch of 8 samples for 4 replicas with 4 micro-batches each"),
    ({"pp": 4, "dp": 1, "tp": 1, "schedule": "interleaved"}, "8 stages of 4 layers"),
]


def test_what_cannot_be_together_is_refused_in_words_and_the_figures_stay(make: Callable[..., PlanExplorer]) -> None:
    explorer = make()
    drawn = content(explorer.figure), content(explorer.timeline_figure)
    for moves, message in REFUSALS:
        with explorer.controls.together():
            for name, value in moves.items():
                getattr(explorer.controls, name).value = value
        assert re.search(message, said(explorer.words)), said(explorer.words)
        assert said(explorer.words).endswith("Drawn is still: 2 x 1 x 2 ranks (dp x pp x tp).")
        assert "Error" not in said(explorer.words) + said(explorer.result)
        assert 'role="status"' in explorer.words.value
        assert drawn == (content(explorer.figure), content(explorer.timeline_figure))
        assert list(explorer.controls.bar.cuts) == []
        assert explorer.run_button.disabled
        assert explorer.describe() in said(explorer.words)
        with pytest.raises(MplabError):
            _ = explorer.prediction
        explorer.plan = Plan(dp=2, tp=2)
        assert not explorer.run_button.disabled
        assert "Drawn is still" not in said(explorer.words)


def test_handles_cut_the_model_and_come_back(make: Callable[..., PlanExplorer]) -> None:
    explorer = make(plan=Plan(dp=2, pp=2))
    bar = explorer.controls.bar
    assert (list(bar.cuts), explorer.plan.cuts) == ([2], None)
    drawn = content(explorer.timeline_figure)
    bar.cuts = [1]
    assert explorer.plan.cuts == (1,)
    assert "cut at [1]" in said(explorer.words)
    assert "Stages: embedding, blocks.0 to head." in said(explorer.words)
    assert content(explorer.timeline_figure) != drawn
    explorer.controls.schedule.value = "interleaved"
    assert (list(bar.cuts), explorer.plan.cuts) == ([1, 2, 3], None), "other stages, other handles"
    assert list(bar.ranks) == [0, 1, 0, 1]
    explorer.controls.schedule.value = "1f1b"
    assert (list(bar.cuts), explorer.plan.cuts) == ([1], (1,))
    bar.cuts = [2]
    assert explorer.plan.cuts is None, "where they were at the start"
    assert content(explorer.timeline_figure) == drawn
    explorer.controls.pp.value = 1
    assert list(bar.cuts) == []
    assert list(bar.names) == ["embedding", "blocks.0", "blocks.1", "head"]
    assert sum(bar.shares) == pytest.approx(1)
    assert [label[1] for label in bar.labels] == ["stage 0"]


def test_another_machine_and_a_large_model_are_predicted_and_do_not_run(make: Callable[..., PlanExplorer]) -> None:
    explorer = make(plan=Plan(pp=2, tp=2, num_microbatches=2))
    controls = explorer.controls
    controls.model.value = GPT3_NAME
    assert explorer.run_button.disabled
    assert "It can't run here: the model is too large for this machine" in said(explorer.result)
    assert "It does not fit." in said(explorer.words)
    controls.machine.value = CLUSTER.name
    assert explorer.plan == Plan(dp=128, pp=2, tp=2, num_microbatches=2), "replicas take the ranks that are left"
    assert list(controls.dp.options) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert 1536 in controls.num_microbatches.options
    assert "It can't run here: 64 x 8 H100 is described" in said(explorer.result)
    assert explorer.figure.data[-1].text[1] == "  not measured: it can't run here"
    assert explorer.model == GPT3
    controls.dp.value = 64
    assert re.search("256 ranks, and 64 x 8 H100 has 512: choose degrees whose product is 512", said(explorer.words))
    assert "It can't run here: 64 x 8 H100 is described" in said(explorer.result), "also while it is refused"
    explorer.plan = Plan(dp=4, pp=32, tp=4, num_microbatches=12)
    assert controls.bar.layout.display == "none", "too many handles"
    assert "Stages" not in said(explorer.words)
    rows = explorer.timeline_figure.layout.yaxis
    assert list(rows.ticktext) == [f"rank {16 * p}" for p in range(8)]
    controls.machine.value, controls.model.value = HERE, LAB
    assert explorer.plan == Plan(pp=2, tp=2, num_microbatches=2), "what was left there"
    assert not explorer.run_button.disabled
    assert said(explorer.result) == ""
    assert controls.bar.layout.display is None


def test_the_best_plan_is_the_one_that_the_search_puts_first(make: Callable[..., PlanExplorer]) -> None:
    explorer = make()
    explorer.best_button.click()
    found = [search(SIZES, CORES.with_ranks(n), BATCH)[0] for n in (1, 2, 4)]
    assert explorer.prediction == min(found, key=lambda prediction: prediction.step_s)
    explorer.controls.machine.value = "8 x H100"
    explorer.best_button.click()
    assert explorer.prediction == search(SIZES, MACHINES["8 x H100"], BATCH)[0]
    assert (explorer.best_button.disabled, explorer.best_button.description) == (False, "Best")
    explorer.controls.model.value = GPT3_NAME
    explorer.best_button.click()
    assert "no plan fits in the 80 GB of a rank" in said(explorer.result)
    assert 'role="alert"' in explorer.result.value


def test_every_plan_can_be_set_and_read(make: Callable[..., PlanExplorer]) -> None:
    explorer = make()
    plans = list(candidates(SIZES, CORES.with_ranks(4), BATCH))
    for plan in [*plans[:: len(plans) // 6], Plan(pp=3, num_microbatches=3, cuts=(1, 3))]:
        explorer.plan = plan
        assert explorer.plan == plan
    assert list(explorer.controls.pp.options) == [1, 2, 3, 4], "also one that there was not"


def test_the_button_trains_and_draws_what_it_measured(make: Callable[..., PlanExplorer]) -> None:
    explorer = make(plan=Plan(dp=2, pp=2, num_microbatches=2))
    before, titles = torch.get_rng_state(), explorer.timeline_figure.layout.title.text
    explorer.run_button.click()
    assert RUN_WORDS.match(said(explorer.result)), said(explorer.result)
    assert 'role="status"' in explorer.result.value
    assert torch.equal(torch.get_rng_state(), before)
    assert "not measured yet" in titles
    title = explorer.timeline_figure.layout.title.text.replace("<br>", " ")
    assert re.match("Median step: predicted .*, measured ", title)
    assert "forward" in {str(t.name).removeprefix("compute: ") for t in explorer.timeline_figure.data}
    measured = [t.x[0] for t in explorer.figure.data if t.type == "bar"][-3:]
    assert min(measured) > 0
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run it")
    explorer.controls.num_microbatches.value = 4
    assert said(explorer.result) == "", "what was measured belonged to what was chosen before"
    assert "not measured yet" in explorer.timeline_figure.layout.title.text
    assert max(t.x[0] for t in explorer.figure.data[-5:-2]) == 0


def test_the_words_of_a_run() -> None:
    step = Timeline([Event(0, "compute", "forward", 0, 1)], 2)
    run = PlanRun([5.0, 4.0, 3.0], step, [0.05, 0.1], MEASURED, 2e-7)
    assert run_words(PREDICTION, run) == (
        "3 steps really ran, the first to warm up. Median step: 75.0 ms measured (from 50.0 ms to 100 ms), 25.0 ms "
        "predicted: 3 times as long.\n"
        "Computing 20.0 ms measured, 10.0 ms predicted; messages and waiting 25.0 ms, 10.0 ms predicted; update 5.00 "
        "ms, 5.00 ms predicted; means of the ranks.\n"
        "The loss went from 5.0000 to 3.0000, as on one rank alone: the losses differ by 2e-07 at most."
    )


def test_a_run_that_fails_or_would_take_too_long_is_told(
    make: Callable[..., PlanExplorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = make(machine=replace(CORES, flops_s=1e5))
    monkeypatch.setattr(World, "run", lambda *args: pytest.fail("a world ran"))
    explorer.run_button.click()
    assert re.search(r"are predicted for 3 steps, and the button stops at 10\.0 s: take", said(explorer.result))
    assert 'role="alert"' in explorer.result.value
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run it")

    def fails(*args: Any) -> Any:
        raise ValueError("no <b>luck</b>")

    monkeypatch.setattr("mplab.show.plan_explorer.run_plan", fails)
    explorer = make()
    explorer.run_button.click()
    assert said(explorer.result) == "ValueError: no <b>luck</b>"
    assert not explorer.run_button.disabled


def test_every_control_has_a_name(make: Callable[..., PlanExplorer]) -> None:
    explorer = make()
    controls = explorer.controls
    assert all(control.description for control in (controls.model, controls.machine, *controls._of_plan))
    assert all(s.continuous_update for s in (controls.dp, controls.pp, controls.tp, controls.num_microbatches))
    assert explorer.run_button.description == "Run it"


def test_figures_are_as_wide_as_the_page_and_there_for_one_that_asks_late(make: Callable[..., PlanExplorer]) -> None:
    explorer = make()
    explorer.box.children[0].width_px = 640
    explorer.controls.zero.value = 1
    assert explorer.figure.layout.width == explorer.timeline_figure.layout.width == 640
    state = explorer.figure.get_state()
    assert [trace["name"] for trace in state["_widget_data"][:4]] == list(MEMORY_PARTS)
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size_max": 9}, "world_size_max=9, num_steps=2: give 1 or more of each, and at most 8 ranks"),
        ({"world_size_max": 0}, "give 1 or more"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"plan": Plan(dp=8)}, "8 ranks, and there are up to 4 here"),
        ({"plan": Plan(tp=4)}, "tp=4 does not divide 2 heads"),
    ],
)
def test_a_start_that_there_is_not(make: Callable[..., PlanExplorer], options: dict[str, Any], message: str) -> None:
    with pytest.raises(MplabError, match=message):
        make(**options)


def test_an_interrupted_measurement_says_how_to_do_without(
    make: Callable[..., PlanExplorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Machine:
        raise KeyboardInterrupt

    monkeypatch.setattr("mplab.show.plan_explorer.measured_machine", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        make(machine=None)
    assert "PlanExplorer(machine=...)" in caught.value.__notes__[0]


def test_a_move_waits_for_no_new_figure(make: Callable[..., PlanExplorer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotly checks each of its parts and copies its template: two thirds of what a move took."""
    explorer = make()
    monkeypatch.setattr("plotly.graph_objects.Figure.__init__", lambda *args, **options: pytest.fail("a new figure"))
    before = content(explorer.timeline_figure)
    explorer.controls.num_microbatches.value = 2
    assert (content(explorer.timeline_figure) != before, said(explorer.result)) == (True, "")


def test_every_machine_has_a_first_plan_for_every_model(make: Callable[..., PlanExplorer]) -> None:
    explorer = make()
    for model, machine in product((LAB, GPT3_NAME), MACHINES):
        with explorer.controls.together():
            explorer.controls.model.value = model
        explorer.controls.machine.value = machine
        assert "Error" not in said(explorer.result)
        assert said(explorer.words)
