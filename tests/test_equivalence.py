"""Every strategy trains as `Serial` does: losses, gradients and weights, and every rank says so."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from pipelines import (
    ALL_ORDERS,
    OPTIMIZERS,
    TOLERANCE,
    Trained,
    assert_trains_alike,
    batches,
    chain,
    folded,
    serial_chain,
    stages_a_rank,
    train_serially,
)
from torch import Tensor, nn
from torch.nn import functional

from mplab import World
from mplab.models import GPT, MLP, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import PipelineParallel
from mplab.plan.partition import by_depth
from mplab.world import Rank

NUM_LAYERS = 8


def check(
    num_ranks: int, model: nn.Module, trained: Trained, cuts: Any, rendezvous: bool = False, **options: Any
) -> None:
    """Train on thread ranks; `model` is shared by all of them, and must stay as it is."""
    optimizer = options.pop("optimizer", "sgd")
    data = options.pop("data", batches())
    World(num_ranks, "cpu", rendezvous=rendezvous).run(
        lambda rank: assert_trains_alike(
            rank.comm, model, trained, cuts, data, optimizer=OPTIMIZERS[optimizer], **options
        )
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained.start[name]), f"{name} of the given model was changed"


# --- the oracle is no empty promise ----------------------------------------------------------------------------------


def test_training_changes_every_weight() -> None:
    """Else equal weights would say nothing; and far more than the tolerance."""
    for trained in (serial_chain(), serial_chain("adamw"), serial_chain(tied=True)):
        for name, weight in trained.weights.items():
            assert (weight - trained.start[name]).abs().max() > 1e-3, name
        assert all(g is not None and g.abs().max() > 1e-4 for g in trained.gradients.values())
        assert max(trained.losses) - min(trained.losses) > 1e-2


@pytest.mark.parametrize("scale", [1 / 3, 1 + 1e-6])
def test_a_loss_of_a_wrong_scale_is_noticed(scale: float) -> None:
    """A forgotten division by m, or a slight one."""
    wrong: Any = lambda y, t: scale * cross_entropy(y, t)  # noqa: E731
    with pytest.raises(AssertionError, match="gradient of"):
        check(2, chain(), serial_chain(), (4,), num_microbatches=3, loss_fn=wrong)


def test_micro_batches_that_weigh_the_same_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """11 samples in 3 parts: 4, 4 and 3."""
    from mplab.parallel import pipeline

    class Even(pipeline.Interpreter):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args[:-1], [1 / len(args[-1])] * len(args[-1]))

    monkeypatch.setattr(pipeline, "Interpreter", Even)
    with pytest.raises(AssertionError, match="gradient of"):
        check(2, chain(), serial_chain(), (4,), num_microbatches=3)


# --- schedules, ranks, micro-batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ALL_ORDERS)
def test_every_schedule_on_every_number_of_ranks_and_micro_batches(order: str, num_ranks: int) -> None:
    """m = 1 ... 8, the odd or the even ones: what a schedule has not on a number of ranks it has on the next.

    Each with cuts of its own; in four of them every two of tied or not, recomputed or not, rendezvous or not meet.
    """
    num_stages = num_ranks * stages_a_rank(order)
    choices = list(itertools.combinations(range(1, NUM_LAYERS), num_stages - 1))
    draw = random.Random(num_stages)
    first = 1 + ([*ALL_ORDERS].index(order) + num_ranks) % 2
    for m in range(first, 9, 2):
        tied, recompute, rendezvous = m > 4, m in (3, 4, 7, 8), m in (3, 4, 5, 6)
        check(
            num_ranks,
            chain(tied=tied),
            serial_chain(tied=tied),
            draw.choice(choices),
            schedule=ALL_ORDERS[order],
            num_microbatches=m,
            recompute=recompute,
            rendezvous=rendezvous,
        )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("order", ALL_ORDERS)
def test_adamw(order: str, recompute: bool) -> None:
    cuts = by_depth(NUM_LAYERS, 3 * stages_a_rank(order)).cuts
    options = {"schedule": ALL_ORDERS[order], "num_microbatches": 4, "recompute": recompute, "optimizer": "adamw"}
    check(3, chain(tied=True), serial_chain("adamw", tied=True), cuts, **options)


# --- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "num_ranks"),
    [("1f1b", 2), ("zero_bubble", 2), ("interleaved", 2), ("1f1b", 3), ("gpipe", 3), ("1f1b", 4)],
)
def test_every_cut_of_a_chain_of_five_layers(order: str, num_ranks: int) -> None:
    """Of an MLP's layers two have no weights: a rank may have nothing to update."""
    model, data = mlp()
    trained = train_serially(mlp()[0], data, OPTIMIZERS["sgd"])
    for cuts in itertools.combinations(range(1, 5), num_ranks * stages_a_rank(order) - 1):
        check(num_ranks, model, trained, cuts, data=data, schedule=order, num_microbatches=4)


def mlp() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randn(9, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    return MLP((3, 5, 4, 2)).double(), [(x, (x.sum(1) > 0).long()) for x in draw]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_cut_of_tied_embeddings(num_ranks: int) -> None:
    for cuts in itertools.combinations(range(1, 5), num_ranks - 1):
        trained = serial_chain(num_layers=5, tied=True)
        check(num_ranks, chain(5, tied=True), trained, cuts, num_microbatches=3)


# --- tied embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_tied_embeddings_in_two_stages_of_one_rank(num_ranks: int, optimizer: str) -> None:
    """No rank has to tell another, but two copies have to agree."""
    options = {"schedule": folded, "num_microbatches": 3, "optimizer": optimizer}
    check(
        num_ranks,
        chain(tied=True),
        serial_chain(optimizer, tied=True),
        (3,) if num_ranks == 1 else (2, 4, 6),
        **options,
    )


def test_each_copy_of_a_tied_weight_has_a_gradient_of_its_own() -> None:
    """What clips one in place must not clip the other."""

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(chain(tied=True), (3,), rank.comm, folded, 3, optimizer=OPTIMIZERS["sgd"])
        pipe.step(batches()[0])
        first, last = (
            next(stage.parameters()) if s == 0 else [*stage.parameters()][-1] for s, stage in pipe.stages.items()
        )
        assert first.shape == last.shape
        assert torch.equal(first.grad, last.grad)
        assert first.grad.data_ptr() != last.grad.data_ptr()

    World(1, "cpu").run(work)


def test_tied_weights_of_three_layers() -> None:
    def model() -> nn.Sequential:
        made = chain(6)
        made[3].up.weight = made[1].up.weight
        made[2].up.weight = made[1].up.weight
        return made

    trained = train_serially(model(), batches(), OPTIMIZERS["sgd"])
    for order, num_ranks, cuts in (("1f1b", 3, (2, 3)), ("zero_bubble", 2, (2,)), ("interleaved", 2, (1, 2, 3))):
        check(num_ranks, model(), trained, cuts, schedule=order, num_microbatches=3)


@pytest.mark.parametrize("order", ["1f1b", "interleaved", "zero_bubble"])
def test_ranks_that_start_from_different_weights_tie_them(order: str) -> None:
    """A rank takes its layers from its own model; of a tied weight all get the first holder's."""
    cuts = by_depth(NUM_LAYERS, 2 * stages_a_rank(order)).cuts

    def work(rank: Rank) -> None:
        model = chain(tied=True, seed=rank.index)
        pipe = PipelineParallel(model, cuts, rank.comm, order, 3, optimizer=OPTIMIZERS["sgd"])
        start = pipe.state_dict()
        assert torch.equal(start["7.weight"], start["0.weight"])
        assert torch.equal(start["0.weight"], chain(tied=True)[0].weight)
        serial = chain(tied=True)
        serial.load_state_dict(start)
        trained = train_serially(serial, batches(), OPTIMIZERS["sgd"])
        losses = [pipe.step(batch) for batch in batches()]
        assert losses == pytest.approx(trained.losses, abs=TOLERANCE)
        for name, weight in pipe.state_dict().items():
            torch.testing.assert_close(weight, trained.weights[name], rtol=0, atol=TOLERANCE)

    World(2, "cpu").run(work)


def test_all_copies_start_alike_where_a_rank_has_two() -> None:
    """Of a weight of three layers, one on rank 0 and two on rank 1, in stages of their own."""

    def work(rank: Rank) -> None:
        model = chain(seed=rank.index)
        model[2].up.weight = model[4].up.weight = model[1].up.weight
        pipe = PipelineParallel(model, (2, 3, 4), rank.comm, "interleaved", 3, optimizer=OPTIMIZERS["sgd"])
        for start in (True, False):
            weights = pipe.state_dict()
            copies = [weights[f"{index}.up.weight"] for index in (1, 2, 4)]
            assert torch.equal(copies[0], chain()[1].up.weight) == start
            assert torch.equal(copies[0], copies[1])
            assert torch.equal(copies[0], copies[2])
            pipe.step(batches()[0])

    World(2, "cpu").run(work)


# --- batches and frozen layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [8, 9, 13, 15])
def test_uneven_batches(num_samples: int) -> None:
    """Of any size, and another one at every step: the loss weighs samples, not micro-batches."""
    data = (*batches(num_samples, 2), *batches(8, 1), *batches(17, 1))
    trained = train_serially(chain(), data, OPTIMIZERS["sgd"])
    for order, m in itertools.product(("1f1b", "zero_bubble"), (1, 5, 8)):
        check(2, chain(), trained, (3,), data=data, schedule=order, num_microbatches=m)


@pytest.mark.parametrize(
    "frozen",
    [(0,), (0, 1, 2, 3), (3, 4), (2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 6), (7,), (4, 5, 6, 7)],
    ids=["embedding", "first stages", "middle", "middle stage", "all but the head", "head", "last stage"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_frozen_layers(frozen: tuple[int, ...], tied: bool) -> None:
    if tied and len(frozen) == 7:
        return  # a head tied to a frozen embedding: nothing is left to train
    trained = serial_chain(tied=tied, frozen=frozen)
    assert any(gradient is None for gradient in trained.gradients.values())
    model = chain(tied=tied, frozen=frozen)
    for order, recompute in (("1f1b", True), ("zero_bubble", False), ("interleaved", False)):
        cuts = (2, 4) if order != "interleaved" else (1, 2, 3, 4, 6)
        check(3, model, trained, cuts, schedule=order, num_microbatches=3, recompute=recompute)


def test_a_single_frozen_parameter() -> None:
    """A weight whose bias is trained, a bias whose weight is."""

    def model() -> nn.Module:
        made = chain()
        made.get_parameter("1.up.weight").requires_grad_(False)
        made.get_parameter("4.up.bias").requires_grad_(False)
        made.get_parameter("7.weight").requires_grad_(False)
        return made

    trained = train_serially(model(), batches(), OPTIMIZERS["adamw"])
    for order in ("1f1b", "zero_bubble"):
        check(2, model(), trained, (4,), schedule=order, num_microbatches=4, optimizer="adamw")


class Stop(nn.Module):
    """Lets no gradient through."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize("cuts", [(2, 3), (3, 5), (2, 4), (4, 5)])
def test_a_layer_that_lets_no_gradient_through(cuts: tuple[int, ...]) -> None:
    """Alone in a stage, first, last or in the middle of one: what is before it stays as it is."""
    model = nn.Sequential(*chain()[:2], Stop(), *chain()[2:])
    trained = train_serially(copy.deepcopy(model), batches(), OPTIMIZERS["sgd"])
    assert trained.gradients["1.up.weight"] is None

    def work(rank: Rank) -> None:
        for order in ("1f1b", "zero_bubble"):
            pipe = PipelineParallel(model, cuts, rank.comm, order, 3, optimizer=OPTIMIZERS["sgd"])
            assert [pipe.step(batch) for batch in batches()] == pytest.approx(trained.losses, abs=TOLERANCE)
            torch.testing.assert_close(pipe.state_dict(), dict(trained.weights), rtol=0, atol=TOLERANCE)

    World(3, "cpu").run(work)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["1f1b", "interleaved", "zero_bubble"])
def test_a_gpt(order: str) -> None:
    config = GPTConfig(vocab_size=7, context_length=4, num_layers=4, num_heads=2, width=8, tied=True)
    trained = train_serially(GPT(config).double(), batches(), OPTIMIZERS["adamw"])
    cuts = by_depth(6, 2 * stages_a_rank(order)).cuts
    check(2, GPT(config).double(), trained, cuts, schedule=order, num_microbatches=4, optimizer="adamw")


def test_a_loss_of_ones_own() -> None:
    """Pictures to numbers: no token, no class."""
    data = [(x, x.sum(1, keepdim=True).expand(-1, 2)) for x, _ in mlp()[1]]
    trained = train_serially(mlp()[0], data, OPTIMIZERS["sgd"], functional.mse_loss)
    check(3, mlp()[0], trained, (1, 3), data=data, num_microbatches=2, loss_fn=functional.mse_loss)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_may_begin_with_a_layer_that_works_in_place(recompute: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.ReLU(inplace=True)).double()
    seed_parameters(model)
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(6, 3, generator=generator).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    trained = train_serially(copy.deepcopy(model), [batch] * 3, OPTIMIZERS["sgd"])
    options = {"schedule": "interleaved", "num_microbatches": 3, "recompute": recompute}
    check(2, model, trained, (1, 2, 3), data=[batch] * 3, **options)
