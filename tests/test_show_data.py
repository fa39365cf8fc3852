"""The explorer of buckets and the bars of ZeRO, without a browser: what they draw, say and train."""

from __future__ import annotations

import gc
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import Link, MplabError, World
from mplab.datasets import Batch
from mplab.models import MLP, cross_entropy
from mplab.parallel import Serial
from mplab.parallel.buckets import make_buckets
from mplab.plan.data import data_parallel_traffic
from mplab.plan.zero import Memory
from mplab.show import BucketExplorer, zero_memory_figure, zero_memory_table
from mplab.show.bucket_step import BucketStep, Setting, hidden_share, messages_s, stalled_s
from mplab.show.buckets import BUCKETS_BYTES, MEMORY, ONE_A_PARAMETER
from mplab.trace import Event, Timeline
from mplab.trace.timeline import PREDICTED_NOTE

SGD = partial(torch.optim.SGD, lr=0.1)
LINK = Link(1e-3, 1e6)
MIB = 1 << 20


def an_mlp() -> MLP:
    return MLP([8, 16, 16, 4])  # gradients of 512, 64, 1024, 64, 256 and 16 bytes


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def made_up_work(step: BucketStep, rank: Any) -> Tensor:
    """In place of measured: forward 1 ms, backward 6 ms with the last gradient after 1 ms, update 2 ms."""
    return 1e-3 * torch.tensor([[1.0, 6.0, 2.0, 6, 5, 4, 3, 2, 1]], dtype=torch.float64)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., BucketExplorer]]:
    made: list[BucketExplorer] = []
    monkeypatch.setattr(BucketStep, "_measure", made_up_work)

    def explorer(num_ranks: int = 2, link: Link | None = LINK, **options: Any) -> BucketExplorer:
        options = {"model": an_mlp(), "bucket_bytes": 1024, "optimizer": SGD, "num_steps": 3, **options}
        world = World(num_ranks, device="cpu", link=link)
        made.append(BucketExplorer(world=world, batch=a_batch(), **options))
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


def messages_of(timeline: Timeline, rank: int = 0) -> list[tuple[float, float]]:
    return [(e.start_s * 1e3, e.end_s * 1e3) for e in timeline.rank(rank) if e.lane == "message"]


# --- the prediction ---------------------------------------------------------------------------------------------------


def test_a_bucket_leaves_when_it_is_full_and_the_one_before_has_arrived(make: Callable[..., BucketExplorer]) -> None:
    predicted = make().predicted()
    # Buckets from the last parameter on: 16 + 256 + 64 bytes, full after 3 ms of backward; 1024, after 4; 64 + 512,
    # after 6. An all-reduce of 2 ranks is 2 messages of half of the bytes each: 2 ms and 1 ms for each 1000 bytes.
    expected = [(4, 6.336), (6.336, 9.36), (9.36, 11.936), (11.936, 11.936 + 2 + 0.064)]
    assert messages_of(predicted) == messages_of(predicted, 1) == [pytest.approx(pair) for pair in expected]
    computed = [(e.name, e.start_s * 1e3, e.end_s * 1e3) for e in predicted.rank(0) if e.lane == "compute"]
    assert computed == [("forward", 0, 1), ("backward", 1, 7), ("update", pytest.approx(14), pytest.approx(16))]
    assert (stalled_s(predicted, 0), messages_s(predicted, 0)) == (pytest.approx(7e-3), pytest.approx(10e-3))
    assert hidden_share(predicted) == pytest.approx(0.3)


def test_without_overlap_all_messages_come_after_backward(make: Callable[..., BucketExplorer]) -> None:
    explorer = make(overlap=False)
    predicted = explorer.predicted()
    assert messages_of(predicted)[0] == pytest.approx((7, 9.336))
    assert predicted.makespan_s == pytest.approx((7 + 10 + 2) * 1e-3)
    assert hidden_share(predicted) == 0
    assert (
        "The ranks wait 10.0 ms for them. With overlap: 16.0 ms a step, of which they wait 7.00 ms."
        in explorer.describe()
    )


@pytest.mark.parametrize(("bucket_bytes", "num_buckets"), [(ONE_A_PARAMETER, 6), (1024, 3), (1 << 26, 1)])
def test_buckets_are_those_of_data_parallel(
    make: Callable[..., BucketExplorer], bucket_bytes: int, num_buckets: int
) -> None:
    explorer = make(bucket_bytes=bucket_bytes)
    assert len(messages_of(explorer.predicted())) == num_buckets + 1
    assert f"in {num_buckets} bucket" in explorer.describe()
    explorer.run_button.click()
    assert said(explorer.result).splitlines()[-1].startswith(f"{num_buckets} bucket")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_bytes_and_messages_are_predicted_exactly(make: Callable[..., BucketExplorer], num_ranks: int) -> None:
    explorer = make(num_ranks)
    buckets = make_buckets(list(an_mlp().parameters()), 1024)
    traffic = data_parallel_traffic(num_ranks, 0, [[p.numel() for p in bucket.parameters] for bucket in buckets])
    counts = f"{traffic.num_sent:,} messages, {traffic.sent_bytes:,} bytes"
    assert f"rank 0 sends {counts}." in explorer.describe()
    explorer.run_button.click()
    assert f"rank 0 sent {counts}, in each step." in said(explorer.result)


def test_messages_through_memory_are_free(make: Callable[..., BucketExplorer]) -> None:
    explorer = make(link=None)
    assert (explorer.latency_s.value, explorer.bandwidth_bytes_s.value) == (0, MEMORY)
    assert explorer.setting.link is None
    assert explorer.predicted().makespan_s == pytest.approx(9e-3)
    assert hidden_share(explorer.predicted()) == 0
    assert "through memory; with overlap" in explorer.describe()
    assert explorer.describe().endswith("messages take no time.")
    assert "messages through memory take no time" in texts(explorer.figure)
    explorer.latency_s.value = 1e-3
    assert explorer.setting.link == Link(1e-3, math.inf)
    assert "over an emulated link of 1 ms and any bandwidth" in explorer.describe()
    assert "emulated link" in texts(explorer.figure)


def test_hidden_and_stalled_by_hand() -> None:
    step = Timeline(
        [
            Event(0, "compute", "forward", 0, 2),
            Event(0, "compute", "backward", 2, 10),
            Event(0, "message", "a", 1, 5),  # 3 of 4 under the backward, and the forward hides nothing
            Event(0, "message", "b", 4, 6),
            Event(0, "message", "c", 9, 14),
            Event(0, "wait", "c", 10, 15),
            Event(0, "compute", "update", 15, 16),
            Event(1, "compute", "backward", 0, 1),
            Event(1, "message", "a", 1, 6),
        ],
        2,
    )
    assert messages_s(step, 0) == 10
    assert (stalled_s(step, 0), stalled_s(step, 1)) == (5, 5)
    assert hidden_share(step) == pytest.approx((4 + 1) / 15)


def test_what_a_step_computes_is_really_measured() -> None:
    model = nn.Sequential(an_mlp(), MLP([4, 4]), nn.Dropout(0.5))
    model[1][0].bias.requires_grad_(False)
    model.unused = nn.Parameter(torch.zeros(3))  # type: ignore[assignment]
    before = torch.get_rng_state()
    step = BucketStep(model, World(2, device="cpu"), a_batch(), cross_entropy, torch.optim.AdamW)
    work = step.work
    assert min(work.forward_s, work.backward_s, work.update_s) > 0
    unused_s, *there_s = work.there_s  # a module's own parameters come before those of its children
    assert len(there_s) == 7
    assert there_s[0] > there_s[4] > there_s[6] > 0, "the last layer's gradients come first"
    assert unused_s >= max(there_s)
    step.run(Setting(ONE_A_PARAMETER, None, True), 2)
    assert torch.equal(torch.get_rng_state(), before), "though ranks drew from it for the dropout"


def test_a_gradient_that_never_comes_is_sent_after_backward() -> None:
    model = an_mlp()
    model.unused = nn.Parameter(torch.zeros(3))  # type: ignore[assignment]
    step = BucketStep(model, World(2, device="cpu"), a_batch(), cross_entropy, SGD)
    predicted = step.predict(Setting(ONE_A_PARAMETER, Link(0, math.inf), True))
    backward = next(e for e in predicted.rank(0) if e.name == "backward")
    assert messages_of(predicted)[-2][0] == pytest.approx(backward.end_s * 1e3)


def test_measuring_leaves_no_copy_of_the_model_behind() -> None:
    def num_parameters() -> int:
        gc.collect()
        return sum(issubclass(type(x), nn.Parameter) for x in gc.get_objects())

    step = BucketStep(an_mlp(), World(2, device="cpu"), a_batch(), cross_entropy, SGD)
    before = num_parameters()
    assert step.work.update_s > 0
    assert num_parameters() == before


# --- the controls -----------------------------------------------------------------------------------------------------


def move_bucket(explorer: BucketExplorer) -> None:
    explorer.bucket_bytes.index += 1


def move_latency(explorer: BucketExplorer) -> None:
    explorer.latency_s.index += 1


def move_bandwidth(explorer: BucketExplorer) -> None:
    explorer.bandwidth_bytes_s.index += 1


def no_overlap(explorer: BucketExplorer) -> None:
    explorer.overlap.value = False


@pytest.mark.parametrize("move", [move_bucket, move_latency, move_bandwidth, no_overlap])
def test_every_control_changes_figure_and_words(
    make: Callable[..., BucketExplorer], move: Callable[[BucketExplorer], None]
) -> None:
    explorer = make(bucket_bytes=1024)
    explorer.run_button.click()
    assert "measured" in explorer.figure.layout.title.text
    before, words, height = drawn(explorer.figure), said(explorer.words), explorer.figure.layout.height
    move(explorer)
    assert drawn(explorer.figure) != before
    assert said(explorer.words) != words
    assert said(explorer.words) == explorer.describe()
    assert 'role="status"' in explorer.words.value
    assert explorer.figure.layout.height == height
    assert said(explorer.result) == "", "what was measured belonged to what was chosen before"
    assert set(shown(explorer.figure)) == {"predicted", "predicted message"}
    assert "not measured yet" in explorer.figure.layout.title.text


def test_the_words_say_it_all(make: Callable[..., BucketExplorer]) -> None:
    assert make().describe() == (
        "2 ranks, 1.891 KiB of gradients in 3 buckets (336 B to 1 KiB), over an emulated link of 1 ms and 1 MB/s; with "
        "overlap. A step: rank 0 sends 8 messages, 2,000 bytes.\n"
        "Predicted: 16.0 ms a step. Forward 1.00 ms, backward 6.00 ms, update 2.00 ms, as measured without messages; "
        "messages 10.0 ms, 30 % of that hidden behind backward.\n"
        "The ranks wait 7.00 ms for them. Without overlap: 19.0 ms a step, of which they wait 10.0 ms."
    )


def test_it_begins_where_it_is_told(make: Callable[..., BucketExplorer]) -> None:
    explorer = make(link=Link(3e-4, 3e8), bucket_bytes=25 << 20, overlap=False)
    assert explorer.setting == Setting(25 << 20, Link(3e-4, 3e8), False)
    assert [value for _, value in explorer.bucket_bytes.options] == sorted([*BUCKETS_BYTES, 25 << 20])
    assert explorer.bucket_bytes.options[0] == ("one a parameter", 1)
    assert explorer.bandwidth_bytes_s.options[-1] == ("memory", math.inf)


def test_the_figure_says_what_the_machine_cannot_prove(
    make: Callable[..., BucketExplorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mplab.world.rungs.num_cores", lambda: 1)
    explorer = make()
    for is_measured in (False, True):
        assert texts(explorer.figure).count("2 ranks share 1 core: times are not speed-ups") == 1
        assert texts(explorer.figure).count("emulated link: 1.00 ms latency, 1 MB/s") == 1
        assert (PREDICTED_NOTE in texts(explorer.figure)) is not is_measured
        explorer.run_button.click()


def test_every_control_has_a_name(make: Callable[..., BucketExplorer]) -> None:
    explorer = make()
    sliders = (explorer.bucket_bytes, explorer.latency_s, explorer.bandwidth_bytes_s)
    assert all(control.description for control in (*sliders, explorer.overlap, explorer.run_button))
    assert all(slider.continuous_update for slider in sliders)


def test_the_figure_is_as_wide_as_the_page(make: Callable[..., BucketExplorer]) -> None:
    explorer = make()
    explorer.box.children[0].width_px = 640
    move_bucket(explorer)
    assert explorer.figure.layout.width == 640
    assert "http" not in explorer.box.children[0]._esm, "it works without the internet"


def test_a_page_that_asks_late_gets_the_whole_figure(make: Callable[..., BucketExplorer]) -> None:
    explorer = make()
    data = explorer.figure.get_state()["_widget_data"]
    assert [trace["name"] for trace in data[:2]] == ["predicted", "predicted message"]
    assert len(data[0]["x"]) == 2 * 3
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_ranks": 1}, "give 2 ranks or more"),
        ({"num_ranks": 9}, "8 samples for 9 ranks"),
        ({"bucket_bytes": 0}, "bucket_bytes=0"),
        ({"num_steps": 1}, "num_steps=1"),
    ],
)
def test_a_wrong_start_is_refused(make: Callable[..., BucketExplorer], options: dict[str, Any], said: str) -> None:
    with pytest.raises(MplabError, match=said):
        make(**options)


# --- the runs ---------------------------------------------------------------------------------------------------------


def test_the_button_trains_as_serial_training_does(make: Callable[..., BucketExplorer]) -> None:
    model, fresh = an_mlp(), an_mlp()
    explorer = make(model=model)
    serial = Serial(fresh, SGD(fresh.parameters()))
    losses = [serial.step(a_batch()) for _ in range(3)]
    for _ in range(2):
        explorer.run_button.click()
        assert (
            f"3 steps really ran; the loss went from {losses[0]:.4f} to {losses[-1]:.4f}. The median step, the first "
            "left out: "
        ) in said(explorer.result)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), an_mlp().parameters(), strict=True))


def test_a_run_is_drawn_below_its_prediction_and_said_in_words(make: Callable[..., BucketExplorer]) -> None:
    explorer = make()
    explorer.run_button.click()
    bars = shown(explorer.figure)
    assert {"predicted", "compute: forward", "compute: backward", "compute: update", "message", "wait"} <= set(bars)
    assert max(bars["predicted"].y) < max(bars["compute: forward"].y), "rank 1: the prediction is above"
    title = explorer.figure.layout.title.text.replace("<br>", " ")
    assert title.startswith("Median step: predicted 16.0 ms, measured ")
    assert re.search(
        r"measured, 16\.0 ms predicted: .* times as long\.\nMeasured in it: backward .* on rank 0, .* on rank 1; "
        r"messages .*, \d+ % of that hidden behind backward \(predicted: 30 %\); waiting for them, or for the "
        r"others, .* on rank 0, .* on rank 1\.\n3 buckets; rank 0 sent 8 messages, 2,000 bytes, in each step\.",
        said(explorer.result),
    )
    kinds = {bars[name].marker.pattern.shape for name in ("compute: forward", "message", "wait")}
    assert len(kinds) == 3, "told apart without colour"


def test_the_messages_are_over_the_waits_for_them() -> None:
    figure = Timeline(
        [Event(0, "wait", "waits", 0, 6), Event(0, "message", "sends", 1, 6), Event(0, "wait", "alone", 6, 9)], 1
    ).figure()
    assert [trace.name for trace in figure.data if trace.type == "bar"] == ["wait", "message"]
    assert sorted(figure.data[-1].text) == ["alone", "sends"], "one label on the other can't be read"


def test_the_link_is_emulated_in_a_run_and_the_world_keeps_its_own() -> None:
    """Not a judgement of speed: messages are held back, so less would be a wrong clock or a lost message."""
    world = World(2, device="cpu")
    step = BucketStep(an_mlp(), world, a_batch(), cross_entropy, SGD)
    run = step.run(Setting(1024, Link(5e-3, math.inf), True), 2)
    assert min(messages_s(run.step, rank) for rank in range(2)) >= 4 * 2 * 5e-3 * 0.99
    assert len(run.losses) == 2
    assert run.num_buckets == 3
    assert world.link is None


def test_ranks_that_share_a_memory_add_up_themselves(make: Callable[..., BucketExplorer]) -> None:
    explorer = make(link=None)
    explorer.run_button.click()
    assert "add up the gradients themselves" in said(explorer.result)
    assert texts(explorer.figure) == "predicted: messages through memory take no time"


def test_a_run_that_would_take_too_long_is_refused_in_words(make: Callable[..., BucketExplorer]) -> None:
    explorer = make(link=Link(1, 1e7))
    explorer.run_button.click()
    assert "are predicted for 3 steps, and the button stops at 10.0 s" in said(explorer.result)
    assert 'role="alert"' in explorer.result.value
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run")


def test_an_error_of_a_run_is_shown_and_the_explorer_stays_usable(make: Callable[..., BucketExplorer]) -> None:
    calls = {"left": 3}

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise ValueError("no <b>luck</b>")
        return cross_entropy(outputs, targets)

    explorer = make(loss_fn=loss_fn)
    explorer.run_button.click()
    assert re.match(r"ValueError: no <b>luck</b>\n\(rank [01] of 2 in forward;", said(explorer.result))
    assert 'role="alert"' in explorer.result.value
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run")
    explorer.run_button.click()
    assert "3 steps really ran" in said(explorer.result)


def test_a_gradient_that_is_no_number_is_shown(make: Callable[..., BucketExplorer]) -> None:
    explorer = make(loss_fn=lambda outputs, targets: outputs.sum() * math.nan)
    explorer.run_button.click()
    assert said(explorer.result).startswith("NonFiniteGradient: rank ")


def test_an_error_of_a_control_is_shown_too(
    make: Callable[..., BucketExplorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = make()

    def fails(*args: object) -> Timeline:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(BucketStep, "predict", fails)
        move_bucket(explorer)
    assert said(explorer.result) == "RuntimeError: no memory"
    move_bucket(explorer)
    assert said(explorer.result) == ""


def test_the_button_is_off_while_it_runs(make: Callable[..., BucketExplorer], monkeypatch: pytest.MonkeyPatch) -> None:
    explorer, seen = make(), []
    run = explorer._step.run

    def looks(*args: Any) -> Any:
        seen.append((explorer.run_button.disabled, explorer.run_button.description))
        return run(*args)

    monkeypatch.setattr(explorer._step, "run", looks)
    explorer.run_button.click()
    assert seen == [(True, "Running …")]
    assert (explorer.run_button.disabled, explorer.run_button.description) == (False, "Run")


# --- the memory of ZeRO -----------------------------------------------------------------------------------------------

PREDICTED = {
    0: Memory(4 * MIB, 4 * MIB, 8 * MIB, 2 * MIB),
    1: Memory(4 * MIB, MIB, 2 * MIB, 2 * MIB),
    3: Memory(MIB, MIB, 2 * MIB, 100),
}
MEASURED = {0: Memory(4 * MIB, 5 * MIB, 8 * MIB, 2 * MIB), 3: 3 * MIB}


def bars_of(figure: Any) -> dict[tuple[str, int], dict[str, float]]:
    """MiB of every part, by kind and stage."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for trace in figure.data:
        if trace.type == "bar":
            for hover, y in zip(trace.hovertext, trace.y, strict=True):
                stage, name, kind = re.match(r"ZeRO (\d), ([a-z ]+), (\w+): ", hover).groups()  # type: ignore[union-attr]
                assert trace.name == (f"{kind}, {name}" if name == "all together" else name)
                found.setdefault((kind, int(stage)), {})[name] = y
    return found


def test_the_bars_are_what_is_held() -> None:
    notes = ["4 ranks share 2 cores: times are not speed-ups"]
    figure = zero_memory_figure(PREDICTED, MEASURED, notes, title="Peak of a step")
    assert figure.layout.title.text == "Peak of a step"
    bars = bars_of(figure)
    parts = ("parameters", "gradients", "optimizer", "activations")
    assert bars["predicted", 0] == dict(zip(parts, (4, 4, 8, 2), strict=True))
    assert bars["predicted", 1] == dict(zip(parts, (4, 1, 2, 2), strict=True))
    assert bars["predicted", 3]["activations"] == 100 / MIB
    assert bars["measured", 0] == dict(zip(parts, (4, 5, 8, 2), strict=True))
    assert bars["measured", 3] == {"all together": 3}
    assert set(bars) == {("predicted", 0), ("predicted", 1), ("predicted", 3), ("measured", 0), ("measured", 3)}
    assert "4 ranks share 2 cores: times are not speed-ups" in texts(figure)
    assert "left of each pair, pale: predicted; right, dark: measured" in texts(figure).replace("<br>", " ")
    assert len(figure.to_json()) < 60_000


def test_the_sums_stand_on_the_bars() -> None:
    figure = zero_memory_figure(PREDICTED, MEASURED)
    predicted, measured = (trace for trace in figure.data if trace.type == "scatter")
    assert list(predicted.text) == ["<b>18</b>", "<b>9</b>", "<b>4</b>"]
    assert list(predicted.y) == pytest.approx([18, 9, 4], rel=1e-3)
    assert list(measured.text) == ["<b>19</b>", "<b>3</b>"]
    assert figure.layout.yaxis.range[1] > 19
    values = {trace.name: list(trace.text) for trace in figure.data if trace.type == "bar" and trace.x[0] < 0}
    assert values["optimizer"] == ["8", "2", "2"]
    assert values["activations"][:2] == ["2", "2"]
    assert figure.layout.uniformtext.mode == "hide", "plotly leaves out what has no room"


def test_predicted_stands_left_of_measured_and_alone_in_the_middle() -> None:
    both, alone = zero_memory_figure(PREDICTED, MEASURED), zero_memory_figure(PREDICTED)
    for stage in (0, 3):
        left, right = (
            {x for t in both.data for x in t.x if abs(x - stage) < 0.5 and (x < stage) is is_left}
            for is_left in (True, False)
        )
        assert max(left) + 0.38 < min(right) + 1e-9, "they do not overlap"
    assert {x for trace in alone.data for x in trace.x} == {0, 1, 3}
    assert "measured" not in texts(alone)


def test_the_parts_are_told_apart_without_colour() -> None:
    figure = zero_memory_figure(PREDICTED, MEASURED)
    hatching = {trace.name: trace.marker.pattern.shape for trace in figure.data if trace.type == "bar"}
    assert len(set(hatching.values())) == len(hatching) == 5
    assert sorted(t.name for t in figure.data if t.type == "bar" and t.showlegend) == sorted(hatching)


def test_parts_that_nobody_holds_are_not_in_the_legend() -> None:
    figure = zero_memory_figure({0: Memory(4, 4, 0, 0)})
    assert [trace.name for trace in figure.data if trace.type == "bar"] == ["parameters", "gradients"]


def test_the_bars_in_words() -> None:
    assert (
        zero_memory_table(PREDICTED, MEASURED)
        == """\
stage              parameters  gradients  optimizer  activations  all together  of stage 0
ZeRO 0  predicted   4,194,304  4,194,304  8,388,608    2,097,152    18,874,368     100.0 %
ZeRO 0  measured    4,194,304  5,242,880  8,388,608    2,097,152    19,922,944     100.0 %  predicted 5.3 % too little
ZeRO 1  predicted   4,194,304  1,048,576  2,097,152    2,097,152     9,437,184      50.0 %
ZeRO 3  predicted   1,048,576  1,048,576  2,097,152          100     4,194,404      22.2 %
ZeRO 3  measured            -          -          -            -     3,145,728      15.8 %  predicted 33.3 % too much"""
    )
    assert zero_memory_table({1: PREDICTED[1]}).splitlines()[-1].endswith("9,437,184           -")


@pytest.mark.parametrize(("predicted", "measured"), [({}, None), ({0: PREDICTED[0]}, {1: 5})])
@pytest.mark.parametrize("show", [zero_memory_figure, zero_memory_table])
def test_what_is_measured_must_be_predicted(show: Any, predicted: Any, measured: Any) -> None:
    with pytest.raises(MplabError, match="predict one or more, and all that are measured"):
        show(predicted, measured)
