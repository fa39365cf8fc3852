"""Layers that change their rank between two steps: training goes on as if nothing had happened."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from pipelines import (
    ALL_ORDERS,
    OPTIMIZERS,
    TOLERANCE,
    assert_losses,
    assert_weights,
    batches,
    chain,
    serial_chain,
    stages_a_rank,
    train_serially,
)
from torch import nn

from mplab import MplabError, World
from mplab.datasets import Batch
from mplab.models import MLP, cross_entropy
from mplab.parallel import PipelineParallel, Serial, pipeline
from mplab.world import Rank

NUM_LAYERS, NUM_STEPS = 8, 5
DATA = batches(num_batches=NUM_STEPS)
Optimizer = Callable[..., torch.optim.Optimizer]


def some_cuts(num_stages: int, draw: random.Random, num_layers: int = NUM_LAYERS) -> tuple[int, ...]:
    return tuple(sorted(draw.sample(range(1, num_layers), num_stages - 1)))


def assert_goes_on(num_ranks: int, order: str, cuts: Sequence[tuple[int, ...]], optimizer: str, tied: bool) -> None:
    """A step with each of the cuts; all losses and the final weights are those of serial training."""
    trained = serial_chain(optimizer, NUM_STEPS, tied=tied)
    model = chain(tied=tied)

    def work(rank: Rank) -> None:
        options = {"num_microbatches": 3, "optimizer": OPTIMIZERS[optimizer]}
        pipe = PipelineParallel(model, cuts[0], rank.comm, ALL_ORDERS[order], **options)
        losses = [pipe.step(DATA[0])]
        for batch, there in zip(DATA[1:], cuts[1:], strict=True):
            pipe.move(there)
            assert pipe.cuts == there
            losses.append(pipe.step(batch))
        assert_losses(losses, trained)
        assert_weights(pipe, trained)

    World(num_ranks, "cpu", rendezvous=True).run(work)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("order", "num_ranks"),
    [("1f1b", 2), ("1f1b", 3), ("1f1b", 4), ("zero_bubble", 3), ("interleaved", 2), ("interleaved", 1), ("folded", 2)],
)
def test_training_goes_on_wherever_layers_are(order: str, num_ranks: int, optimizer: str) -> None:
    """Tied with one optimizer and not with the other, by turns."""
    is_even = (num_ranks + stages_a_rank(order)) % 2 == 0
    tied = is_even == (optimizer == "adamw")
    draw = random.Random(num_ranks)
    num_stages = num_ranks * stages_a_rank(order)
    for _ in range(2):
        assert_goes_on(num_ranks, order, [some_cuts(num_stages, draw) for _ in DATA], optimizer, tied)


@given(st.lists(st.sets(st.integers(1, 7), min_size=2, max_size=2), min_size=NUM_STEPS, max_size=NUM_STEPS))
@settings(max_examples=15)
def test_any_way_of_any_cuts(cuts: list[set[int]]) -> None:
    assert_goes_on(3, "1f1b", [tuple(sorted(there)) for there in cuts], "adamw", True)


def test_all_layers_but_one_go_from_the_first_rank_to_the_last_and_back() -> None:
    assert_goes_on(2, "1f1b", [(7,), (1,), (7,), (1,), (4,)], "adamw", True)


# --- the optimizer's state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_the_optimizers_state_it_would_be_another_training(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So equal losses do show that the state has moved."""
    put_states = pipeline.put_states

    def forgetful(states: Any, stages: Any, optimizer: Any) -> None:
        put_states([type(state)(state.tensors, {}) for state in states], stages, optimizer)

    monkeypatch.setattr(pipeline, "put_states", forgetful)
    with pytest.raises(AssertionError, match="loss"):
        assert_goes_on(2, "1f1b", [(4,), (4,), (4,), (3,), (4,)], optimizer, False)


def test_what_the_optimizer_remembers_is_where_the_layer_is() -> None:
    """Momenta and the number of steps, to the bit, and none of a layer that has left."""
    model = chain()
    kinds = {"step", "exp_avg", "exp_avg_sq"}

    def remembered(pipe: PipelineParallel) -> dict[str, dict[str, torch.Tensor]]:
        assert pipe.optimizer is not None
        named = [named for stage in pipe.stages.values() for named in stage.named_parameters()]
        assert set(pipe.optimizer.state) == {parameter for _, parameter in named}
        return {name: {k: v.clone() for k, v in pipe.optimizer.state[p].items()} for name, p in named}

    def work(rank: Rank) -> list[Any]:
        pipe = PipelineParallel(model, (2, 5), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["adamw"])
        for batch in DATA[:3]:
            pipe.step(batch)
        before = remembered(pipe)
        pipe.move((4, 7))
        return [before, remembered(pipe)]

    of_ranks = World(3, "cpu").run(work)
    before, after = ({k: v for of_rank in of_ranks for k, v in of_rank[i].items()} for i in (0, 1))
    assert set(before) == set(after) == {name for name, _ in model.named_parameters()}
    for name, values in before.items():
        assert set(values) == set(after[name]) == kinds
        assert values["step"] == 3
        torch.testing.assert_close(after[name], values, rtol=0, atol=0)
    assert set(of_ranks[0][1]) > set(of_ranks[0][0])


def slow_down(optimizer: torch.optim.Optimizer | None) -> None:
    for group in optimizer.param_groups if optimizer is not None else ():
        group["lr"] *= 0.5


def slower_and_slower(model: nn.Module, data: Sequence[Batch], optimizer: str) -> list[float]:
    """The losses of serial training whose learning rate is halved after every step."""
    serial = Serial(model, OPTIMIZERS[optimizer](model.parameters()))
    losses = []
    for batch in data:
        losses.append(serial.step(batch))
        slow_down(serial.optimizer)
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_learning_rate_that_was_changed_is_kept(optimizer: str) -> None:
    model = chain()
    losses = slower_and_slower(model, DATA, optimizer)

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(chain(), (4,), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS[optimizer])
        got = []
        for batch, cut in zip(DATA, (4, 2, 7, 1, 5), strict=True):
            pipe.move((cut,))
            got.append(pipe.step(batch))
            slow_down(pipe.optimizer)
        assert got == pytest.approx(losses, abs=TOLERANCE)

    World(2, "cpu").run(work)


def test_a_learning_rate_outlives_a_time_without_weights() -> None:
    """The middle rank has a GELU alone for a while, and no optimizer."""

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(MLP((3, 5, 4, 2)).double(), (2, 4), rank.comm, optimizer=OPTIMIZERS["sgd"])
        for group in pipe.optimizer.param_groups if pipe.optimizer is not None else ():
            group["lr"] = 0.01
        pipe.move((1, 2))
        assert (pipe.optimizer is None) == (rank.index == 1)
        pipe.move((2, 4))
        assert pipe.optimizer is not None
        assert [group["lr"] for group in pipe.optimizer.param_groups] == [0.01]

    World(3, "cpu").run(work)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rank_that_had_no_weights_takes_the_learning_rate_of_the_others(optimizer: str) -> None:
    """Which has changed while the rank had no optimizer to change it in, at the start or for a time."""

    data, model = pictures(), MLP((3, 5, 4, 2)).double()
    losses = slower_and_slower(model, data, optimizer)

    def work(rank: Rank) -> None:
        options = {"num_microbatches": 3, "optimizer": OPTIMIZERS[optimizer]}
        pipe = PipelineParallel(MLP((3, 5, 4, 2)).double(), (1, 2), rank.comm, **options)
        got = []
        for batch, cuts in zip(data, ((1, 2), (2, 3), (1, 4), (3, 4), (1, 3)), strict=True):
            pipe.move(cuts)
            assert (pipe.optimizer is None) == (rank.index == 1 and cuts in ((1, 2), (3, 4)))
            got.append(pipe.step(batch))
            slow_down(pipe.optimizer)
        assert got == pytest.approx(losses, abs=TOLERANCE)
        torch.testing.assert_close(pipe.state_dict(), dict(model.state_dict()), rtol=0, atol=TOLERANCE)

    World(3, "cpu").run(work)


def test_a_rank_without_weights_takes_a_learning_rate_that_is_a_tensor() -> None:
    def work(rank: Rank) -> None:
        optimizer = partial(torch.optim.Adam, lr=torch.tensor(0.25), foreach=False)
        pipe = PipelineParallel(MLP((3, 5, 4, 2)), (1, 2), rank.comm, optimizer=optimizer)
        for group in pipe.optimizer.param_groups if pipe.optimizer is not None else ():
            group["lr"] = group["lr"] * 0.5
        pipe.move((2, 3))
        assert pipe.optimizer is not None
        assert pipe.optimizer.param_groups[0]["lr"] == 0.125

    World(3, "cpu").run(work)


class Remembering(torch.optim.SGD):
    """Has a state of None, as long as nothing else is to be remembered."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] |= {"before": None, "steps": self.state[parameter].get("steps", 0) + 1}


def test_a_state_of_none_moves() -> None:
    """It was taken for a tensor that follows, and never came."""
    trained = train_serially(chain(), DATA, partial(Remembering, lr=0.3, momentum=0.9))

    def work(rank: Rank) -> None:
        options = {"num_microbatches": 3, "optimizer": partial(Remembering, lr=0.3, momentum=0.9)}
        pipe = PipelineParallel(chain(), (4,), rank.comm, **options)
        losses = []
        for batch, cut in zip(DATA, (4, 2, 7, 1, 5), strict=True):
            pipe.move((cut,))
            losses.append(pipe.step(batch))
        assert_losses(losses, trained)
        assert_weights(pipe, trained)
        assert pipe.optimizer is not None
        for state in pipe.optimizer.state.values():
            assert set(state) == {"momentum_buffer", "before", "steps"}
            assert (state["before"], state["steps"]) == (None, NUM_STEPS)

    World(2, "cpu").run(work)


# --- other models ----------------------------------------------------------------------------------------------------


def pictures(num_batches: int = NUM_STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randn(9, 3, generator=generator, dtype=torch.float64) for _ in range(num_batches)]
    return [(x, (x.sum(1) > 0).long()) for x in draw]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_weight_that_is_tied_within_a_stage_comes_apart_and_together_again(optimizer: str) -> None:
    """Layers 1, 2 and 3 have one weight; each copy takes along what the optimizer knows of it."""

    def model() -> nn.Sequential:
        made = chain()
        made[2].up.weight = made[3].up.weight = made[1].up.weight
        return made

    trained = train_serially(model(), DATA, OPTIMIZERS[optimizer])

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(model(), (4,), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS[optimizer])
        losses = []
        for batch, cut in zip(DATA, (4, 2, 3, 1, 5), strict=True):
            pipe.move((cut,))
            losses.append(pipe.step(batch))
        assert_losses(losses, trained)
        assert_weights(pipe, trained)

    World(2, "cpu").run(work)


def test_a_rank_may_lose_its_last_weight_and_get_one_again() -> None:
    """Its only layer is then a GELU, and it has no optimizer meanwhile."""
    data = pictures()
    trained = train_serially(MLP((3, 5, 4, 2)).double(), data, OPTIMIZERS["adamw"])

    def work(rank: Rank) -> None:
        options = {"num_microbatches": 3, "optimizer": OPTIMIZERS["adamw"]}
        pipe = PipelineParallel(MLP((3, 5, 4, 2)).double(), (2, 4), rank.comm, **options)
        losses = []
        for batch, cuts in zip(data, ((1, 2), (2, 3), (3, 4), (1, 3), (1, 2)), strict=True):
            pipe.move(cuts)
            assert (pipe.optimizer is None) == (rank.index == 1 and cuts in ((1, 2), (3, 4)))
            losses.append(pipe.step(batch))
        assert_losses(losses, trained)
        assert_weights(pipe, trained)

    World(3, "cpu").run(work)


def test_buffers_move_too() -> None:
    """Running means and variances, and the number of batches, which is no float."""

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norms = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        model = nn.Sequential(nn.Linear(3, 5), norms[0], nn.Tanh(), nn.Linear(5, 5), norms[1]).double()
    reference, data = copy.deepcopy(model), pictures()
    serial = Serial(reference, OPTIMIZERS["sgd"](reference.parameters()), cross_entropy, 3)
    losses = [serial.step(batch) for batch in data]

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(model, (4,), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["sgd"])
        got = []
        for batch, cut in zip(data, (3, 1, 2, 4, 1), strict=True):
            pipe.move((cut,))
            got.append(pipe.step(batch))
        assert got == pytest.approx(losses, abs=TOLERANCE)
        weights = pipe.state_dict()
        assert weights["1.num_batches_tracked"].dtype == torch.long
        torch.testing.assert_close(weights, dict(reference.state_dict()), rtol=0, atol=TOLERANCE)

    World(2, "cpu").run(work)


class Counting(nn.Linear):
    """Its output depends on how many batches it has seen, which no `state_dict` tells."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("num_seen", torch.zeros(()), persistent=False)
        self.register_buffer("seen", torch.zeros(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_seen += 0.1
        self.seen = torch.cat([self.seen, self.num_seen[None]])
        return super().forward(x) * (1 + self.num_seen + self.seen.mean())


def test_buffers_that_no_state_dict_has_stay_and_move_too() -> None:
    """Where the layer stays on its rank as well: every stage is made anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(Counting(3, 5), nn.Tanh(), Counting(5, 5), nn.Tanh(), Counting(5, 2)).double()
    reference, data = copy.deepcopy(model), pictures()
    serial = Serial(reference, OPTIMIZERS["sgd"](reference.parameters()), cross_entropy, 3)
    losses = [serial.step(batch) for batch in data]
    want = dict(reference.named_buffers())
    assert len(want["0.seen"]) == 3 * NUM_STEPS

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(model, (3,), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["sgd"])
        got = []
        for batch, cut in zip(data, (3, 1, 2, 4, 3), strict=True):
            pipe.move((cut,))
            got.append(pipe.step(batch))
        assert got == pytest.approx(losses, abs=TOLERANCE)
        for stage in pipe.stages.values():
            for name, buffer in stage.named_buffers():
                torch.testing.assert_close(buffer, want[name], rtol=0, atol=0)

    World(2, "cpu").run(work)


@pytest.mark.parametrize("frozen", [(0,), (3, 4), (0, 1, 2, 3, 4, 5, 6)])
def test_frozen_layers_stay_frozen_where_they_go(frozen: tuple[int, ...]) -> None:
    trained = serial_chain("adamw", NUM_STEPS, frozen=frozen)

    def work(rank: Rank) -> None:
        options = {"num_microbatches": 3, "optimizer": OPTIMIZERS["adamw"]}
        pipe = PipelineParallel(chain(frozen=frozen), (2, 4), rank.comm, "zero_bubble", **options)
        losses = []
        for batch, cuts in zip(DATA, ((2, 4), (4, 6), (1, 7), (3, 5), (6, 7)), strict=True):
            pipe.move(cuts)
            losses.append(pipe.step(batch))
        assert_losses(losses, trained)
        assert_weights(pipe, trained)

    World(3, "cpu").run(work)


# --- what is sent, and what is refused -------------------------------------------------------------------------------


def test_only_layers_that_change_their_rank_are_sent() -> None:
    """Weights and momenta of the layers in between, and nothing where the cuts stay."""
    world = World(2, "cpu")
    model = chain()

    def work(rank: Rank, cuts: Sequence[int]) -> None:
        pipe = PipelineParallel(model, (4,), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["sgd"])
        pipe.step(DATA[0])
        rank.comm.ledger.messages.clear()
        pipe.move(cuts)

    world.run(work, (4,))
    assert [len(ledger.of("send")) for ledger in world.ledgers] == [0, 0]
    world.run(work, (2,))
    assert [len(ledger.of("all_gather")) for ledger in world.ledgers] == [1, 1]  # the cuts
    tensors = sum(2 * p.nbytes for i in (2, 3) for p in model[i].parameters())  # and the momentum of each
    sent = [sum(m.sent_bytes for m in ledger.of("send")) for ledger in world.ledgers]
    names = sent[0] - tensors
    assert 0 < names < 2 * 3 * 100
    assert sent[1] == 0
    assert len(world.ledgers[0].of("send")) == 2 * (1 + 2 * 3)


BAD_CUTS: list[tuple[Any, str]] = [
    ((4,), "3 stages have 2, not 1"),
    ((5, 5), "5 is there twice"),
    ((5, 2), "out of order"),
    ((0, 4), "0 is out of range"),
    ((2, 8), "8 is out of range"),
    ((2, "4"), "'4' is no whole number"),
    (None, "they are a sequence"),
]


def test_bad_cuts_move_nothing() -> None:
    def work(rank: Rank) -> None:
        pipe = PipelineParallel(chain(), (2, 5), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["sgd"])
        losses = [pipe.step(DATA[0])]
        stages, optimizer = dict(pipe.stages), pipe.optimizer
        for cuts, message in BAD_CUTS:
            with pytest.raises(MplabError, match=message):
                pipe.move(cuts)
            assert (pipe.cuts, pipe.stages, pipe.optimizer) == ((2, 5), stages, optimizer)
        losses += [pipe.step(batch) for batch in DATA[1:]]
        assert_losses(losses, serial_chain("sgd", NUM_STEPS))

    World(3, "cpu").run(work)


def test_cuts_that_differ_between_ranks_move_nothing() -> None:
    def work(rank: Rank) -> None:
        pipe = PipelineParallel(chain(), (4,), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["sgd"])
        losses = [pipe.step(DATA[0])]
        with pytest.raises(MplabError) as caught:
            pipe.move((3 + rank.index,))
        assert "cuts on rank 0: [3]\n  cuts on rank 1: [4]" in str(caught.value)
        losses += [pipe.step(batch) for batch in DATA[1:]]
        assert_losses(losses, serial_chain("sgd", NUM_STEPS))

    World(2, "cpu").run(work)


# --- from one run of the world to the next ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("tied", [False, True])
def test_training_goes_on_in_another_run(order: str, tied: bool) -> None:
    """A new run has new communicators, also those by which tied weights are added up."""
    num_stages = 2 * stages_a_rank(order)
    draw = random.Random(1)
    there = [some_cuts(num_stages, draw) for _ in DATA]

    def build(rank: Rank) -> PipelineParallel:
        options = {"num_microbatches": 3, "optimizer": OPTIMIZERS["adamw"]}
        return PipelineParallel(chain(tied=tied), there[0], rank.comm, order, **options)

    def go_on(rank: Rank, pipes: list[PipelineParallel], step: int) -> float:
        pipe = pipes[rank.index]
        pipe.connect(rank.comm)
        if step % 2:
            pipe.move(there[step])
        return pipe.step(DATA[step])

    world = World(2, "cpu")
    pipes = world.run(build)
    losses = []
    for step in range(NUM_STEPS):
        losses.append(world.run(go_on, pipes, step))
        sums = [len(ledger.of("all_reduce_")) for ledger in world.ledgers]
        assert sums == [int(tied)] * 2, "tied weights were added up by another run's communicators"
    trained = serial_chain("adamw", NUM_STEPS, tied=tied)
    for rank in (0, 1):
        assert_losses([of_ranks[rank] for of_ranks in losses], trained)

    def check(rank: Rank) -> None:
        pipes[rank.index].connect(rank.comm)
        assert_weights(pipes[rank.index], trained)

    world.run(check)


def test_a_rank_takes_up_its_own_stages_and_no_others() -> None:
    def build(rank: Rank) -> PipelineParallel:
        return PipelineParallel(chain(), (4,), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["sgd"])

    pipes = World(2, "cpu").run(build)

    def mixed_up(rank: Rank) -> None:
        with pytest.raises(MplabError, match=f"connect to rank {rank.index} of 2: this is rank "):
            pipes[1 - rank.index].connect(rank.comm)

    World(2, "cpu").run(mixed_up)
    with pytest.raises(MplabError, match="connect to rank 0 of 1: this is rank 0 of 2"):
        World(1, "cpu").run(lambda rank: pipes[0].connect(rank.comm))
