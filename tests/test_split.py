"""The explorer of split points, without a browser: what it predicts and says, and that its button trains."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mplab import Link, MplabError, World
from mplab.datasets import Batch
from mplab.models import GPT, GPTConfig, cross_entropy, layers
from mplab.parallel import Serial
from mplab.plan.partition import LayerCost, by_time, stage_costs
from mplab.plan.schedule import ORDERS, build
from mplab.plan.simulate import memory_bytes, simulate
from mplab.show import SplitExplorer
from mplab.show.cut_bar import cut_bar_class, shares
from mplab.show.forecast import Choice, Forecaster
from mplab.show.parts import error_paragraph
from mplab.trace.timeline import PREDICTED_NOTE

SGD = partial(torch.optim.SGD, lr=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
NUM_SAMPLES = 8


def gpt(num_layers: int = 4) -> GPT:
    return GPT(GPTConfig(vocab_size=32, context_length=8, num_layers=num_layers, num_heads=2, width=16)).double()


def a_batch() -> Batch:
    tokens = torch.randint(32, (NUM_SAMPLES, 9), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def costs_of(model: nn.Module, num_microbatches: int) -> list[LayerCost]:
    """Made up, in place of measured: the blocks take longer the later they come."""
    names, share = [layer.name for layer in layers(model)], 1 / num_microbatches
    return [
        LayerCost(name, share * (i + 1) * 1e-3, share * (i + 1) * 2e-3, 0, 0, 1e-4, share * 4e4, share * 4e5, 1e5)
        for i, name in enumerate(names)
    ]


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers are not measured; returns with how many micro-batches they would have been."""
    asked: list[int] = []

    def made_up(model: nn.Module, batch: Batch, num_microbatches: int, *how: object) -> list[LayerCost]:
        asked.append(num_microbatches)
        return costs_of(model, num_microbatches)

    monkeypatch.setattr("mplab.show.forecast.profile_layers", made_up)
    return asked


@pytest.fixture
def make(profiled: list[int]) -> Iterator[Callable[..., SplitExplorer]]:
    made: list[SplitExplorer] = []

    def explorer(num_ranks: int = 2, num_layers: int = 4, **options: Any) -> SplitExplorer:
        options = {"optimizer": SGD, "num_microbatches": 4, "num_steps": 2, **options}
        made.append(SplitExplorer(gpt(num_layers), World(num_ranks, device="cpu"), a_batch(), **options))
        return made[-1]

    yield explorer
    for explorer_ in made:
        explorer_.box.close_all()


def said(paragraph: Any) -> str:
    return html.unescape(re.sub("<[^>]*>", "", paragraph.value))


def shown(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data if trace.visible is not False and trace.name}


def drawn(figure: Any) -> str:
    return json.dumps([trace.to_plotly_json() for trace in figure.data if trace.visible is not False], default=list)


def texts(figure: Any) -> str:
    return " ".join(str(annotation.text) for annotation in figure.layout.annotations)


def serial_losses(num_steps: int, optimizer: Any) -> list[float]:
    model = gpt()
    serial = Serial(model, optimizer(model.parameters()))
    return [serial.step(a_batch()) for _ in range(num_steps)]


# --- the prediction ---------------------------------------------------------------------------------------------------


def test_it_begins_at_the_best_cut_and_draws_what_is_simulated(make: Callable[..., SplitExplorer]) -> None:
    explorer = make()
    costs = costs_of(gpt(), 4)
    best = by_time([cost.forward_s + cost.backward_s for cost in costs], 2)
    assert explorer.cuts == best.cuts == (4,)
    expected = simulate(build("1f1b", 2, 4), stage_costs(costs, (4,)))
    predicted = explorer.predicted()
    assert predicted.timeline.events == expected.events
    bars = shown(explorer.figure)
    assert set(bars) == {"predicted", "predicted message"}
    assert len(bars["predicted"].x) == len([e for e in expected.events if e.lane == "compute"])
    assert sum(bars["predicted"].x) == pytest.approx(1e3 * sum(predicted.work_s), rel=1e-6)


def test_balance_bubble_and_memory(make: Callable[..., SplitExplorer]) -> None:
    explorer = make(cuts=(3,))
    predicted = explorer.predicted()
    # 6 layers of 1 to 6 parts of 3 ms / 4: 6 parts in front of the cut, 15 behind it.
    work = [4 * 6 * 3e-3 / 4 + 3e-4, 4 * 15 * 3e-3 / 4 + 3e-4]
    assert predicted.work_s == pytest.approx(work)
    assert predicted.balance == pytest.approx(max(work) / (sum(work) / 2))
    assert predicted.bubble == pytest.approx(1 - sum(work) / (2 * predicted.timeline.makespan_s))
    assert predicted.equal_bubble == pytest.approx(1 / 5)  # (p - 1) / (m + p - 1)
    stages = stage_costs(costs_of(gpt(), 4), (3,))
    assert predicted.memory_bytes == memory_bytes(build("1f1b", 2, 4), stages, state_copies=0)


@pytest.mark.parametrize(("optimizer", "num_copies"), [(ADAMW, 2), (SGD, 0), (MOMENTUM, 1)])
def test_the_optimizer_says_what_it_holds(make: Callable[..., SplitExplorer], optimizer: Any, num_copies: int) -> None:
    stages = stage_costs(costs_of(gpt(), 4), (4,))
    expected = memory_bytes(build("1f1b", 2, 4), stages, state_copies=num_copies)
    assert make(optimizer=optimizer).predicted().memory_bytes == expected


def test_recomputation_takes_time_and_saves_memory(make: Callable[..., SplitExplorer]) -> None:
    explorer = make(schedule="gpipe")
    before = explorer.predicted()
    explorer.recompute.value = True
    after = explorer.predicted()
    assert after.timeline.makespan_s > before.timeline.makespan_s
    assert all(a < b for a, b in zip(after.memory_bytes, before.memory_bytes, strict=True))
    assert [stage.activation_bytes for stage in after.stages] == [0, 1e4], "the input, but of the batch itself"
    assert "activations recomputed" in said(explorer.words)


def test_the_layers_are_measured_once_for_every_size(make: Callable[..., SplitExplorer], profiled: list[int]) -> None:
    explorer = make()
    for m in (8, 4, 8):
        explorer.num_microbatches.value = m
        explorer.cuts = (2,)
        explorer.cuts = (3,)
    assert profiled == [4, 8]


def test_a_link_and_launches_are_predicted(make: Callable[..., SplitExplorer]) -> None:
    free = make().predicted().timeline.makespan_s
    assert make(launch_s=1e-3).predicted().timeline.makespan_s > free
    explorer = make(link=Link(1e-3, 1e8))
    assert explorer.predicted().timeline.makespan_s > free
    assert sum(shown(explorer.figure)["predicted message"].x) > 0
    assert "link" in texts(explorer.figure)


def test_the_figure_says_what_the_machine_cannot_prove(
    make: Callable[..., SplitExplorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mplab.world.rungs.num_cores", lambda: 1)
    explorer = make()
    shared = simulate(build("1f1b", 2, 4), stage_costs(costs_of(gpt(), 4), (4,)), cores=1)
    assert explorer.predicted().timeline.events == shared.events
    assert texts(explorer.figure).count("2 ranks share 1 core: times are not speed-ups") == 1
    assert PREDICTED_NOTE in texts(explorer.figure)
    explorer.run_button.click()
    assert texts(explorer.figure).count("2 ranks share 1 core: times are not speed-ups") == 1
    assert PREDICTED_NOTE not in texts(explorer.figure), "what was measured is drawn over it"


# --- the controls -----------------------------------------------------------------------------------------------------


def move_a_handle(explorer: SplitExplorer) -> None:
    explorer.bar.cuts = [2]


def choose_microbatches(explorer: SplitExplorer) -> None:
    explorer.num_microbatches.value = 8


def choose_gpipe(explorer: SplitExplorer) -> None:
    explorer.schedule.value = "gpipe"


def choose_interleaved(explorer: SplitExplorer) -> None:
    explorer.schedule.value = "interleaved"


def recompute(explorer: SplitExplorer) -> None:
    explorer.recompute.value = True


@pytest.mark.parametrize("move", [move_a_handle, choose_microbatches, choose_gpipe, choose_interleaved, recompute])
def test_every_control_changes_figure_and_words(
    make: Callable[..., SplitExplorer], move: Callable[[SplitExplorer], None]
) -> None:
    explorer = make(schedule="zero_bubble")
    before, words = drawn(explorer.figure), said(explorer.words)
    move(explorer)
    assert drawn(explorer.figure) != before
    assert said(explorer.words) != words
    assert said(explorer.words) == explorer.describe()
    assert 'role="status"' in explorer.words.value


def test_the_words_say_it_all(make: Callable[..., SplitExplorer]) -> None:
    explorer = make(cuts=(3,))
    predicted = explorer.predicted()
    assert explorer.describe() == (
        "1F1B, 2 ranks, 4 micro-batches. A micro-batch forward and backward: "
        "stage 0 on rank 0 is embedding to blocks.1, 4.50 ms; stage 1 on rank 1 is blocks.2 to head, 11.2 ms.\n"
        f"Predicted: {predicted.timeline.makespan_s * 1e3:.1f} ms a step, L = 1.42, "
        f"bubble {100 * predicted.bubble:.0f} % (equal stages: 20 %). The slowest stage is fastest if cut before "
        f"blocks.3: {explorer._forecaster.forecast(Choice((4,), '1f1b', 4, False)).timeline.makespan_s * 1e3:.1f} ms "
        "a step.\n"
        # Three layers' weights and gradients, 0.6 MB, and their activations, 0.3 MB for each micro-batch in flight.
        "Peak memory, predicted: rank 0 1.144 MiB, rank 1 878.9 KiB."
    )


def test_best_goes_to_the_optimum(make: Callable[..., SplitExplorer]) -> None:
    explorer = make(cuts=(1,))
    explorer.best_button.click()
    assert explorer.cuts == (4,)
    assert "No other cut has a faster slowest stage." in explorer.describe()


def test_two_stages_a_rank_have_their_own_handles(make: Callable[..., SplitExplorer]) -> None:
    explorer = make(cuts=(2,))
    explorer.schedule.value = "interleaved"
    times_s = [cost.forward_s + cost.backward_s for cost in costs_of(gpt(), 4)]
    assert explorer.cuts == by_time(times_s, 4).cuts
    assert explorer.bar.ranks == [0, 1, 0, 1]
    assert len(explorer.bar.labels) == 4
    explorer.cuts = (1, 2, 3)
    explorer.schedule.value = "gpipe"
    assert explorer.cuts == (2,)
    assert explorer.bar.ranks == [0, 1]
    explorer.schedule.value = "interleaved"
    assert explorer.cuts == (1, 2, 3)


def test_schedules_that_need_more_layers_are_not_offered(make: Callable[..., SplitExplorer]) -> None:
    assert [name for _, name in make(2, 2).schedule.options] == list(ORDERS)
    assert "interleaved" not in [name for _, name in make(4, 4, num_microbatches=1).schedule.options]


def test_cuts_that_do_not_fit_are_refused_and_nothing_moves(make: Callable[..., SplitExplorer]) -> None:
    explorer = make(cuts=(3,))
    for cuts in ((0,), (6,), (2, 3), (1.5,)):
        with pytest.raises(MplabError, match="each above the one before"):
            explorer.cuts = cuts  # type: ignore[assignment]
    assert explorer.cuts == (3,)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_schedule_is_drawn_on_the_same_traces_and_the_rows_stay(
    make: Callable[..., SplitExplorer], num_ranks: int
) -> None:
    explorer = make(num_ranks, 6)
    num_traces, height = len(explorer.figure.data), explorer.figure.layout.height
    for schedule in ORDERS:
        explorer.schedule.value = schedule
        for m in (1, 2, 8):
            explorer.num_microbatches.value = m
            events = [e for e in explorer.predicted().timeline.events if e.lane == "compute"]
            assert len(shown(explorer.figure)["predicted"].x) == len(events)
            assert len(explorer.figure.data) == num_traces
            assert explorer.figure.layout.height == height
            assert (
                explorer.figure.layout.xaxis.range[1]
                > max(
                    base + x for bar in shown(explorer.figure).values() for base, x in zip(bar.base, bar.x, strict=True)
                )
                * 0.999
            )
            assert said(explorer.result) == ""


def test_every_control_has_a_name(make: Callable[..., SplitExplorer]) -> None:
    explorer = make()
    controls = (explorer.num_microbatches, explorer.schedule, explorer.recompute)
    assert all(control.description for control in (*controls, explorer.best_button, explorer.run_button))
    assert explorer.num_microbatches.continuous_update


def test_the_bar_is_to_scale_and_every_layer_can_be_taken_hold_of() -> None:
    assert shares([1.0, 3.0]) == [0.25, 0.75]
    assert shares([0.0, 0.0]) == [0.5, 0.5]
    wide = shares([0.0, 1.0, 1.0])
    assert sum(wide) == pytest.approx(1)
    assert wide[0] > 0.02
    assert wide[1] == wide[2]
    assert min(shares([0.0] * 99 + [1.0])) >= 0.003


def test_the_figures_are_as_wide_as_the_page(make: Callable[..., SplitExplorer]) -> None:
    explorer = make()
    explorer.box.children[0].width_px = 640
    explorer.cuts = (2,)
    assert explorer.figure.layout.width == explorer.loss_figure.layout.width == 640


def test_the_bar_is_one_file_of_each_kind() -> None:
    assert "export default { render }" in cut_bar_class()._esm
    assert ".mplab-cuts" in cut_bar_class()._css
    assert "http" not in cut_bar_class()._esm + cut_bar_class()._css, "it works without the internet"


def test_a_page_that_asks_late_gets_the_whole_figures(make: Callable[..., SplitExplorer]) -> None:
    explorer = make()
    data = explorer.figure.get_state()["_widget_data"]
    assert data[0]["name"] == "predicted"
    assert len(data[0]["x"]) > 0
    assert explorer.bar.get_state()["labels"][0][0].startswith("stage 0, rank 0: ")
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (1, {}),
        (7, {}),
        (2, {"schedule": "1b1f"}),
        (4, {"schedule": "interleaved"}),
        (2, {"num_microbatches": 9}),
        (2, {"num_microbatches": 0}),
        (2, {"num_steps": 0}),
        (2, {"cuts": (6,)}),
        (2, {"cuts": (1, 2)}),
    ],
)
def test_a_wrong_start_is_refused(make: Callable[..., SplitExplorer], num_ranks: int, options: dict[str, Any]) -> None:
    with pytest.raises(MplabError):
        make(num_ranks, **options)


# --- the runs ---------------------------------------------------------------------------------------------------------


def test_the_losses_go_on_however_it_is_cut(make: Callable[..., SplitExplorer]) -> None:
    explorer = make(optimizer=MOMENTUM)
    for change, began in (
        (lambda: None, "The pipeline was built;"),
        (lambda: None, "The pipeline went on;"),
        (lambda: setattr(explorer, "cuts", (2,)), "Layers moved to other ranks, with their optimizer's state;"),
        (lambda: setattr(explorer.schedule, "value", "zero_bubble"), "The pipeline was built anew, with the trained"),
        (lambda: setattr(explorer.schedule, "value", "interleaved"), "The pipeline was built anew, with the trained"),
        (lambda: setattr(explorer, "cuts", (1, 2, 3)), "Layers moved to other ranks"),
        (lambda: setattr(explorer.recompute, "value", True), "The pipeline was built anew"),
        (lambda: setattr(explorer.num_microbatches, "value", 2), "The pipeline was built anew"),
    ):
        change()
        explorer.run_button.click()
        assert began in said(explorer.result)
        assert {pipeline.cuts for pipeline in explorer._training._pipelines} == {explorer.cuts}
    assert len(explorer.losses) == 16
    assert explorer.losses == pytest.approx(serial_losses(16, MOMENTUM), abs=1e-9)
    assert list(explorer.loss_figure.data[0].y) == explorer.losses
    assert explorer.loss_figure.data[0].hovertext[4].startswith("run 3, 1F1B, 4 micro-batches, cut before blocks.1:")


def test_the_model_is_not_changed(make: Callable[..., SplitExplorer], profiled: list[int]) -> None:
    model, fresh = gpt(), gpt()
    explorer = SplitExplorer(model, World(2, device="cpu"), a_batch(), num_steps=1, optimizer=SGD)
    explorer.run_button.click()
    assert said(explorer.result).startswith("1 step")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    explorer.box.close_all()


def test_a_run_is_drawn_below_its_prediction(make: Callable[..., SplitExplorer]) -> None:
    explorer = make()
    height = explorer.figure.layout.height
    explorer.run_button.click()
    bars = shown(explorer.figure)
    assert explorer.figure.layout.height == height, "room was kept for its legend"
    assert {"predicted", "compute: forward", "compute: backward", "compute: update"} <= set(bars)
    assert len(bars["compute: forward"].x) == len(bars["compute: backward"].x) == 2 * 4
    assert max(bars["predicted"].y) < max(bars["compute: forward"].y), "rank 1: the prediction is above"
    assert explorer.figure.layout.title.text.startswith("Last step: predicted ")
    assert re.search(
        r"Last step: \d.* measured, .* predicted: .* times as long\. All steps: from ", said(explorer.result)
    )
    assert f"the loss went from {explorer.losses[0]:.4f} to {explorer.losses[-1]:.4f}" in said(explorer.result)


def test_what_was_measured_goes_with_its_cut_and_the_losses_stay(make: Callable[..., SplitExplorer]) -> None:
    explorer = make()
    explorer.run_button.click()
    explorer.cuts = (2,)
    assert set(shown(explorer.figure)) == {"predicted", "predicted message"}
    assert "not measured yet" in explorer.figure.layout.title.text
    assert said(explorer.result) == ""
    assert len(explorer.loss_figure.data[0].y) == 2


def test_the_button_is_off_while_it_runs(make: Callable[..., SplitExplorer], monkeypatch: pytest.MonkeyPatch) -> None:
    explorer, seen = make(), []
    run = explorer._training.run

    def looks(*args: Any) -> Any:
        seen.append((explorer.run_button.disabled, explorer.run_button.description))
        return run(*args)

    monkeypatch.setattr(explorer._training, "run", looks)
    explorer.run_button.click()
    assert seen == [(True, "Running …")]
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run")


def test_an_error_is_shown_and_the_training_goes_on_where_it_was(make: Callable[..., SplitExplorer]) -> None:
    calls = {"left": 10**9}

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise ValueError("no <b>luck</b>")
        return cross_entropy(outputs, targets)

    explorer = make(loss_fn=loss_fn, optimizer=ADAMW)
    explorer.run_button.click()
    calls["left"] = 6  # the second micro-batch of the second step
    explorer.run_button.click()
    assert said(explorer.result).startswith("ValueError: no <b>luck</b>\n(rank 1 of 2 in forward of micro-batch 1;")
    assert 'role="alert"' in explorer.result.value
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run")
    assert len(explorer.losses) == 2
    explorer.cuts = (2,)
    explorer.run_button.click()
    assert "The pipeline was built anew" in said(explorer.result)
    assert explorer.losses == pytest.approx(serial_losses(4, ADAMW), abs=1e-9)


def test_an_error_of_a_control_is_shown_too(
    make: Callable[..., SplitExplorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = make()

    def fails(*args: object) -> list[LayerCost]:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("mplab.show.forecast.profile_layers", fails)
        explorer.num_microbatches.value = 8
    assert said(explorer.result) == "RuntimeError: no memory"
    explorer.num_microbatches.value = 4
    assert said(explorer.result) == ""
    assert said(explorer.words) == explorer.describe()


def test_an_error_says_its_notes() -> None:
    error = ValueError("this")
    error.add_note("(rank 1)")
    assert error_paragraph(error).endswith(">ValueError: this\n(rank 1)</p>")


def test_layers_are_really_measured() -> None:
    forecaster = Forecaster(gpt(), World(2, device="cpu"), a_batch(), cross_entropy, SGD)
    costs = forecaster.costs(4)
    assert [cost.name for cost in costs] == ["embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert all(cost.forward_s > 0 for cost in costs)
    assert all(cost.backward_s > 0 for cost in costs[1:])
    assert costs[1].output_bytes == NUM_SAMPLES / 4 * 8 * 16 * 8
