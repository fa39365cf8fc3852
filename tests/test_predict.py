from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mplab.errors import MplabError
from mplab.models import MLP
from mplab.parallel.predict import Predictor, measure_launch_s
from mplab.plan.cost import Link
from mplab.plan.schedule import ORDERS, build, interleaved
from mplab.world import World
from mplab.world.rungs import num_cores

LINK = Link(1e-4, 1e8)
MODEL = MLP((4, 8, 8, 8, 3), seed=1)
BATCH = torch.arange(32.0).reshape(8, 4) / 32, torch.arange(8) % 3


def cuts_of(schedule: str) -> tuple[int, ...]:
    return (1, 3, 4) if schedule == "interleaved" else (3,)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(MODEL, BATCH, World(2, "cpu", link=LINK))


@pytest.mark.parametrize("schedule", sorted(ORDERS))
def test_the_prediction_has_the_events_of_the_run(predictor: Predictor, schedule: str) -> None:
    comparison = predictor.compare(cuts_of(schedule), schedule, 4)
    kinds = []
    for timeline in (comparison.predicted, comparison.measured):
        computed = [(e.rank, e.name, e.microbatch) for e in timeline.events if e.lane == "compute"]
        sent = [(e.rank, e.size_bytes) for e in timeline.events if e.name == "send"]
        kinds.append((sorted(computed, key=str), sorted(sent)))
    assert kinds[0] == kinds[1]
    assert sum(seconds for _, seconds in comparison.parts) == pytest.approx(comparison.measured_s, rel=1e-12)
    predicted = predictor.predict(cuts_of(schedule), schedule, 4)
    assert comparison.predicted == predicted
    assert predicted.title == schedule


def test_what_was_measured_is_used(predictor: Predictor) -> None:
    assert predictor.link == LINK
    assert predictor.cores == num_cores()
    costs, launch_s = predictor.measured(4)
    assert [cost.name for cost in costs] == [str(i) for i in range(len(MODEL))]
    assert launch_s > 0
    assert predictor.measured(4) is predictor.measured(4)
    parts = dict(predictor.compare((3,), "gpipe", 4).parts)
    assert parts["launch"] > 0
    assert parts["transfer"] > 2 * LINK.latency_s


def test_a_step_that_ran_elsewhere_can_be_compared(predictor: Predictor) -> None:
    measured = predictor.run((3,), "gpipe", 4, num_steps=1)
    assert predictor.compare((3,), build("gpipe", 2, 4), measured=measured).measured == measured
    assert measured.notes == predictor.world.notes
    assert min(e.start_s for e in measured.events) >= 0


def test_orders_of_ones_own_can_be_predicted(predictor: Predictor) -> None:
    timeline = predictor.predict((1, 2, 3, 4, 5), partial(interleaved, num_chunks=3), 4)
    assert {e.name for e in timeline.events} >= {"forward of chunk 2", "backward of chunk 0"}


def test_the_model_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Predictor(model, BATCH, World(1, "cpu")).compare((), "naive", 2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_one_rank_needs_no_link() -> None:
    predictor = Predictor(MODEL, BATCH, World(1, "cpu"))
    assert predictor.link is None
    assert {e.lane for e in predictor.predict((), "1f1b", 2).events} == {"compute"}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_launching_costs_something_on_any_number_of_ranks(num_ranks: int) -> None:
    assert 0 < measure_launch_s(World(num_ranks, "cpu"), 1000, 2, num_steps=3) < 1


def test_what_does_not_fit_is_refused(predictor: Predictor) -> None:
    with pytest.raises(MplabError, match="cut"):
        predictor.predict((9,), "1f1b", 4)
    with pytest.raises(MplabError, match="cut"):
        predictor.predict((1, 2), "1f1b", 4)
    with pytest.raises(MplabError, match="2f2b"):
        predictor.predict((1,), "2f2b", 4)
    with pytest.raises(MplabError, match="9 micro-batches of 8 samples"):
        predictor.predict((1,), "1f1b", 9)


def test_a_loss_of_ones_own_is_the_one_that_is_measured() -> None:
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(outputs))
        return nn.functional.cross_entropy(outputs, targets)

    Predictor(MODEL, BATCH, World(2, "cpu", link=LINK), loss, torch.optim.SGD).measured(4)
    assert set(calls) == {2}


def test_recomputation_is_another_forward_in_every_backward(predictor: Predictor) -> None:
    plain, again = (predictor.predict((3,), "gpipe", 4, recompute) for recompute in (False, True))
    costs, _ = predictor.measured(4)
    for rank, layers in enumerate((costs[:3], costs[3:])):
        lengths = [
            sum(e.duration_s for e in timeline.rank(rank) if e.name == "backward") for timeline in (plain, again)
        ]
        assert lengths[1] - lengths[0] == pytest.approx(4 * sum(layer.forward_s for layer in layers))
    comparison = predictor.compare((3,), "gpipe", 4, recompute=True)
    assert comparison.predicted.events == again.events
