"""One plan for everything, as one calls it: what it refuses, what it keeps and hands on, what each axis carries.

That it trains as serial training does is for test_equivalence_hybrid.py.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid import (
    LENGTH,
    NUM_SAMPLES,
    OPTIMIZERS,
    TOLERANCE,
    WIDTH,
    assert_same,
    batches,
    frozen_gpt,
    gpt,
    seeded,
    serial,
    serially,
    smoothed,
    snapshot,
    train,
)
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

import mplab.__main__ as command_line
from mplab import Mesh, Plan, World
from mplab.comm.ledger import Message
from mplab.errors import MplabError, NonFiniteGradient
from mplab.models import GPT
from mplab.parallel import DataParallel, HybridParallel, Serial, TensorParallel, parallelize
from mplab.plan.data import data_parallel_traffic, sharded_traffic, total_traffic
from mplab.plan.schedule import build
from mplab.plan.tensor import Block, tensor_parallel_traffic
from mplab.plan.traffic import Traffic, direct_traffic, pipeline_traffic
from mplab.world import Rank
from mplab.world.join import VARIABLES

ITEM_BYTES = 8

# --- that a plan is what is done, and not only what it comes to ------------------------------------------------------


def test_the_stages_are_cut_where_the_plan_says() -> None:
    def work(rank: Rank) -> list[list[str]]:
        engines = [
            HybridParallel(gpt(False), rank.comm, Plan(1, 2, 2, cuts, schedule))
            for cuts, schedule in (((3,), "gpipe"), ((1, 2, 3), "interleaved"), (None, "1f1b"))
        ]
        assert [engine.schedule for engine in engines] == [
            build(name, 2, 1) for name in ("gpipe", "interleaved", "1f1b")
        ]
        return [
            list(
                dict.fromkeys(
                    ".".join(key.split(".")[:2]) for stage in engine.stages.values() for key in stage.state_dict()
                )
            )
            for engine in engines
        ]

    first, *_, last = World(4, "cpu").run(work)
    ends = ["embedding.token", "embedding.position"], ["head.norm", "head.projection"]
    assert first == [[*ends[0], "blocks.0", "blocks.1"], [*ends[0], "blocks.1"], [*ends[0], "blocks.0"]]
    assert last == [ends[1], ["blocks.0", *ends[1]], ["blocks.1", *ends[1]]]


def test_a_stage_starts_as_its_own_rank_has_it_and_a_tied_weight_as_the_first() -> None:
    models = [GPT(gpt().config, seed).double() for seed in (0, 9)]

    def work(rank: Rank) -> dict[str, Tensor]:
        return HybridParallel(models[rank.index], rank.comm, Plan(pp=2, cuts=(2,))).full_state_dict()

    first, second = (model.state_dict() for model in models)
    tied = {"head.projection.weight": first["head.projection.weight"]}
    want = {key: (first if key.startswith(("embedding", "blocks.0")) else second)[key] for key in first} | tied
    for got in World(2, "cpu").run(work):
        assert_same(got, want)


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_computes_each_stage_twice(recompute: bool) -> None:
    def work(rank: Rank) -> int:
        plan = Plan(1, 2, 1, num_microbatches=3, recompute=recompute)
        engine = HybridParallel(gpt(), rank.comm, plan)
        calls: list[None] = []
        for stage in engine.stages.values():
            stage.register_forward_hook(lambda *_: calls.append(None))
        engine.step(batches()[0])
        return len(calls)

    assert World(2, "cpu").run(work) == [6 if recompute else 3] * 2


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_with_zero_each_replica_updates_its_share_alone(zero: int) -> None:
    num_elements = sum(p.numel() for p in gpt().parameters())

    def work(rank: Rank) -> int:
        engine = HybridParallel(gpt(), rank.comm, Plan(4, zero=zero))
        engine.step(batches()[0])
        assert engine.optimizer is not None
        mine = [p for group in engine.optimizer.param_groups for p in group["params"]]
        kept = [state["exp_avg"].numel() for state in engine.optimizer.state.values()]
        assert sum(kept) == sum(p.numel() for p in mine)
        return sum(kept)

    kept = World(4, "cpu").run(work)
    assert sum(kept) == num_elements * (1 if zero else 4)
    assert max(kept) - min(kept) <= 10  # a chunk of each of few flats


def test_a_rank_with_nothing_to_train_has_no_optimizer() -> None:
    def work(rank: Rank) -> bool:
        return HybridParallel(frozen_gpt(), rank.comm, Plan(1, 2, 1, (2,))).optimizer is None

    assert World(2, "cpu").run(work) == [True, False]


def test_gradients_that_are_shared_out_are_nowhere_whole() -> None:
    def work(rank: Rank) -> None:
        for zero in (1, 2, 3):
            engine = HybridParallel(gpt(), rank.comm, Plan(2, zero=zero))
            engine.step(batches()[0])
            with pytest.raises(
                MplabError, match=f"zero={zero}: no rank keeps whole gradients; look at them with zero=0"
            ):
                engine.full_gradients()

    World(2, "cpu").run(work)


# --- what is refused before a rank starts ----------------------------------------------------------------------------


class NoWorld(World):
    """Of which no rank may start."""

    def run(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("a rank has started")


def no_chain() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(4, 4)})


MISFITS: dict[str, tuple[Plan, int, dict[str, Any], list[str]]] = {
    "too few ranks": (Plan(2, 2, 2), 4, {}, ["2 x 2 x 2 = 8 ranks (dp x pp x tp), and there are 4: choose degrees"]),
    "too many ranks": (Plan(2), 4, {}, ["2 x 1 x 1 = 2 ranks (dp x pp x tp), and there are 4: choose degrees"]),
    "more stages than layers": (Plan(pp=5), 5, {}, ["5 stages of 4 layers: every stage has one layer or more"]),
    "interleaved stages": (Plan(pp=3, schedule="interleaved"), 3, {}, ["6 stages of 4 layers"]),
    "cuts out of range": (Plan(pp=2, cuts=(9,)), 2, {}, ["cuts [9]: 9 is out of range"]),
    "cuts for others": (Plan(pp=2, cuts=(1, 2)), 2, {}, ["cuts [1, 2]: 2 stages have 1, not 2"]),
    "no chain for a pipeline": (Plan(pp=2), 2, {"model": no_chain()}, ["ModuleDict is not known as a chain"]),
    "no chain for ZeRO": (Plan(zero=2), 1, {"model": no_chain()}, ["ModuleDict is not known as a chain"]),
    "heads": (Plan(tp=3), 3, {}, ["3 ranks"]),
    "a model without a plan": (Plan(tp=2), 2, {"model": no_chain()}, ["ModuleDict"]),
    "an empty plan": (Plan(tp=2), 2, {"tensor_plan": {}}, ["plan {}: give a dict of patterns and styles"]),
    "a loss of whole logits": (Plan(tp=2), 2, {"loss_fn": smoothed}, ["the plan leaves the logits cut over the ranks"]),
    "nobody to share with": (Plan(2, sequence_parallel=True), 2, {}, ["sequence_parallel with tp=1"]),
    "dropout twice": (
        Plan(2, recompute=True),
        2,
        {"model": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))},
        ["recompute=True, but 1 drops activations at random (p = 0.1)"],
    ),
    "two faults": (
        Plan(2, sequence_parallel=True, recompute=True),
        1,
        {"model": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))},
        ["2 x 1 x 1 = 2 ranks", "sequence_parallel with tp=1", "recompute=True, but 1 drops"],
    ),
    "many faults": (
        Plan(2, 2, 3, (9,), recompute=True),
        4,
        {"loss_fn": smoothed, "model": "with dropout"},
        [
            "2 x 2 x 3 = 12 ranks (dp x pp x tp), and there are 4",
            "cuts [9]: 9 is out of range",
            "3 ranks",
            "the plan leaves the logits cut",
            "recompute=True, but blocks.0.mlp.dropout drops",
        ],
    ),
    "one fault, found twice": (Plan(pp=2, zero=0, tp=2), 4, {"model": no_chain()}, ["ModuleDict", "ModuleDict"]),
}


def with_dropout() -> nn.Module:
    model = copy.deepcopy(gpt())
    model.blocks[0].mlp.dropout = nn.Dropout(0.1)
    return model


@pytest.mark.parametrize("name", MISFITS)
def test_a_plan_that_does_not_fit_is_refused_with_all_of_its_faults(name: str) -> None:
    plan, num_ranks, options, faults = MISFITS[name]
    model = options.get("model", gpt())
    options = {"model": with_dropout() if model == "with dropout" else model} | {
        key: value for key, value in options.items() if key != "model"
    }
    with pytest.raises(MplabError) as caught:
        parallelize(world=NoWorld(num_ranks, "cpu"), plan=plan, **options)
    first, *said = str(caught.value).split("\n")
    assert first == f"this plan ({plan}) does not fit:"
    said = [line for line in said if line[:2] == "  " and line[2] != " "]  # not the lists of layers and the like
    assert len(said) == len(faults)
    assert all(fault in line for fault, line in zip(faults, said, strict=True))


NO_TRAINING: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": "gpt"}, "model is a str: give an nn.Module"),
    "nothing to train": ({"model": nn.Linear(2, 2).requires_grad_(False)}, "no parameter of this model is trained"),
    "no loss function": ({"loss_fn": None}, "loss_fn is a NoneType"),
    "an optimizer of all weights": (
        {"optimizer": torch.optim.SGD([torch.zeros(1)])},
        "optimizer is a SGD: each rank makes its own",
    ),
    "a layer without a shape": ({"model": nn.Sequential(nn.LazyLinear(3), nn.Tanh())}, "0.weight has no shape yet"),
    "weights that the forward changes": (
        {"model": nn.Sequential(nn.Embedding(4, 2, max_norm=0.5), nn.Linear(2, 4))},
        r"0 is an Embedding with max_norm=0.5: it changes .*; leave it out",
    ),
    "gradients by frequency": (
        {"model": nn.EmbeddingBag(4, 2, scale_grad_by_freq=True)},
        "the model is an EmbeddingBag with scale_grad_by_freq=True: it divides",
    ),
    "sparse gradients": ({"model": nn.Sequential(nn.Embedding(4, 2, sparse=True))}, "sparse=True: its gradients are"),
    "a norm of nothing": ({"max_norm": 0}, "max_norm 0: must be a number above 0"),
}


@pytest.mark.parametrize("name", NO_TRAINING)
def test_what_nobody_can_train_with_is_refused(name: str) -> None:
    options, message = NO_TRAINING[name]
    options = {"model": gpt(), "plan": Plan(2)} | options
    with pytest.raises(MplabError, match=message):
        parallelize(world=NoWorld(2, "cpu"), **options)


@pytest.mark.parametrize("zero", [0, 1])
def test_a_parameter_that_is_trained_later_on_is_refused(zero: int) -> None:
    trained = parallelize(frozen_gpt(), World(2, "cpu"), Plan(2, zero=zero), optimizer=OPTIMIZERS["sgd"])
    trained.step(batches()[0])
    for engine in trained.engines.values():
        for stage in engine.stages.values():
            stage.requires_grad_(True)
    with pytest.raises(MplabError, match="a parameter that was frozen is trained now"):
        trained.step(batches()[1])


def test_a_rank_refuses_what_does_not_fit_too() -> None:
    def work(rank: Rank) -> None:
        with pytest.raises(MplabError, match=r"does not fit:\n  4 x 1 x 1 = 4 ranks .*\n  sequence_parallel with"):
            HybridParallel(gpt(), rank.comm, Plan(4, sequence_parallel=True))
        with pytest.raises(MplabError, match="max_norm -1: must be"):
            HybridParallel(gpt(), rank.comm, Plan(2), max_norm=-1)
        assert not rank.comm.ledger.messages

    World(2, "cpu").run(work)


# --- what else may be given ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [Plan(2), Plan(1, 2)], ids=str)
def test_batches_may_come_from_an_iterator(plan: Plan) -> None:
    """Every rank gets all of them."""
    trained = parallelize(gpt(), World(2, "cpu"), plan, optimizer=OPTIMIZERS["sgd"])
    losses = trained.steps(iter(batches()))
    model = copy.deepcopy(gpt())
    engine = Serial(model, OPTIMIZERS["sgd"](model.parameters()))
    assert losses == pytest.approx([engine.step(batch) for batch in batches()], abs=TOLERANCE)
    assert_same(trained.full_state_dict(), model.state_dict(), TOLERANCE)


def in_two_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Reads them twice, as whoever spares biases and norms the decay."""
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.01)


@pytest.mark.parametrize("kind", [DataParallel, TensorParallel, HybridParallel])
def test_an_optimizer_may_read_its_parameters_twice(kind: Any) -> None:
    def work(rank: Rank) -> dict[str, Tensor]:
        options = {"plan": Plan(2)} if kind is HybridParallel else {}
        engine = kind(gpt(False), rank.comm, optimizer=in_two_groups, **options)
        for batch in batches():
            engine.step(batch)
        return dict(engine.state_dict() if kind is DataParallel else engine.full_state_dict())

    model = copy.deepcopy(gpt(False))
    engine = Serial(model, in_two_groups(list(model.parameters())))
    for batch in batches():
        engine.step(batch)
    for state in World(2, "cpu").run(work):
        assert_same(state, model.state_dict(), TOLERANCE)


COMPLEX_PLANS = [Plan(2, zero=zero) for zero in range(4)] + [Plan(1, 2, schedule="zero_bubble", num_microbatches=2)]


@pytest.mark.parametrize("plan", COMPLEX_PLANS, ids=str)
def test_complex_weights_are_trained_and_clipped(plan: Plan) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, device="meta", dtype=torch.complex128) for _ in range(4)))
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.complex128)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(p.shape))
    pairs = [(draw(4, 3), draw(4, 3)) for _ in range(3)]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().square().mean()

    sgd = partial(torch.optim.SGD, lr=0.05)
    trained = parallelize(model, World(2, "cpu"), plan, loss, sgd, max_norm=0.5)
    losses = trained.steps(pairs)
    engine = Serial(model, sgd(model.parameters()), loss, max_norm=0.5)
    assert losses == pytest.approx([engine.step(pair) for pair in pairs], abs=TOLERANCE)
    assert_same(trained.full_state_dict(), model.state_dict(), TOLERANCE)


# --- what ranks were given differently -------------------------------------------------------------------------------


def small(**changes: Any) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, **changes)))


class Named(nn.Module):
    """Its parameters are called as settings are."""

    def __init__(self) -> None:
        super().__init__()
        self.max_norm, self.plan = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))


HALF = {"blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row"}
DIFFER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "schedule": ({}, {"plan": Plan(2, schedule="gpipe")}, r'plan on rank 1: "\{.*gpipe'),
    "degrees": ({}, {"plan": Plan(1, 2)}, r'plan on rank 0: "\{.*\\"dp\\": 2.*\n  plan on rank 1: "\{.*\\"pp\\": 2'),
    "max_norm": ({}, {"max_norm": 1.0}, "max_norm on rank 0: null\n  max_norm on rank 1: 1.0"),
    "sizes": ({"model": small()}, {"model": small(bias=False)}, r'rank 0: \{"1.bias": \[\[4\]'),
    "fewer layers": ({"model": small()[:1]}, {"model": small()}, r'rank 1: \{"1.weight": \[\[4, 4\]'),
    "frozen": ({"model": small()}, {"model": small().requires_grad_(False)[:1].requires_grad_()}, "on rank 1: "),
    "dtype": ({"model": small()}, {"model": small().float()}, "torch.float64"),
    "names as of settings": (
        {"model": Named()},
        {"model": Named(), "max_norm": 1.0},
        "max_norm on rank 0: null\n  max_norm on rank 1: 1.0",
    ),
    "tensor plan": (
        {"plan": Plan(tp=2), "model": gpt(), "tensor_plan": HALF},
        {"plan": Plan(tp=2), "model": gpt()},
        r'tensor_plan on rank 0: \{"blocks.\*.mlp.up": "column".*\n  tensor_plan on rank 1: null',
    ),
}


@pytest.mark.parametrize("what", DIFFER)
def test_settings_that_differ_are_told_with_what_each_rank_has(what: str) -> None:
    *of_ranks, message = DIFFER[what]
    model = small()

    def work(rank: Rank) -> None:
        options: dict[str, Any] = {"model": model, "plan": Plan(2)} | of_ranks[rank.index]  # type: ignore[operator]
        with pytest.raises(MplabError, match=f"(?s)the ranks were given different settings.*{message}"):
            HybridParallel(comm=rank.comm, **options)

    World(2, "cpu").run(work)


@pytest.mark.parametrize("plan", [Plan(2), Plan(2, zero=3), Plan(pp=2, num_microbatches=2), Plan(tp=2)], ids=str)
@pytest.mark.parametrize("num_samples", [NUM_SAMPLES, NUM_SAMPLES + 1])
def test_batches_that_differ_are_refused(plan: Plan, num_samples: int) -> None:
    """Each rank is to have all of the batch; ranks on a tensor axis would mix two into one that there never was."""
    of_ranks = batches()[0], batches(num_samples, seed=2)[0]

    def work(rank: Rank) -> None:
        engine = HybridParallel(gpt(), rank.comm, plan)
        before = engine.full_state_dict()
        with pytest.raises(MplabError, match=r"the first batch on rank 0: .*\n  the first batch on rank 1: "):
            engine.step(of_ranks[rank.index])
        assert_same(engine.full_state_dict(), before)

    World(2, "cpu").run(work)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_batch_too_small_for_every_microbatch_is_refused(zero: int) -> None:
    trained = parallelize(gpt(), World(2, "cpu"), Plan(2, zero=zero, num_microbatches=3))
    for num_samples in (0, 1, 5):
        with pytest.raises(MplabError) as caught:
            trained.step(batches(num_samples)[0])
        assert str(caught.value).startswith(
            f"a batch of {num_samples} samples for 2 replicas with 3 micro-batches each: every micro-batch needs one "
            "sample or more; take 6 samples or more, or fewer micro-batches"
        )
    with pytest.raises(
        MplabError, match=r"2 replicas with 1 micro-batch each: .* take 2 samples or more, or fewer rep"
    ):
        parallelize(gpt(), World(2, "cpu"), Plan(2, zero=zero)).step(batches(1)[0])
    with pytest.raises(MplabError, match="6 inputs and 7 targets"):
        trained.step((batches(6)[0][0], batches(7)[0][1]))
    assert trained.num_steps == 0
    assert trained.step(batches(6)[0]) > 0
    assert trained.num_steps == 1


def test_a_sequence_that_cannot_be_shared_out_is_refused() -> None:
    trained = parallelize(gpt(), World(2, "cpu"), Plan(tp=2, sequence_parallel=True))
    with pytest.raises(MplabError, match="7"):
        trained.step((batches()[0][0][:, :7], batches()[0][1][:, :7]))


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [*(Plan(2, zero=zero) for zero in range(4)), Plan(1, 2), Plan(tp=2), Plan(2, 1, 2, zero=3), Plan(2, 2, zero=1)],
    ids=str,
)
def test_a_gradient_that_is_not_finite_changes_nothing_and_training_goes_on(plan: Plan) -> None:
    """The weights are loaded with a NaN, and with those of before again."""
    trained = parallelize(gpt(), World(plan.num_ranks, "cpu"), plan, optimizer=OPTIMIZERS["sgd"])
    losses = [trained.step(batch) for batch in batches()[:2]]
    good = trained.full_state_dict()
    bad = good | {"blocks.1.mlp.up.bias": torch.full_like(good["blocks.1.mlp.up.bias"], math.nan)}
    trained.load_full_state_dict(bad)
    with pytest.raises(NonFiniteGradient, match=r"^rank \d, step 2: the gradient of [a-z]\S+ has a NaN or an Inf"):
        trained.step(batches()[2])
    assert trained.num_steps == 2
    torch.testing.assert_close(trained.full_state_dict(), bad, rtol=0, atol=0, equal_nan=True)
    trained.load_full_state_dict(good)
    losses += trained.steps(batches()[2:])
    assert losses == pytest.approx(serial("tied").losses, rel=0, abs=TOLERANCE)
    assert_same(trained.full_state_dict(), serial("tied").weights, TOLERANCE)


def test_a_gradient_that_one_rank_has_leaves_the_weights_of_others_finite() -> None:
    """Of a stage alone: the other stages may have made their update, and no more."""

    def work(rank: Rank) -> None:
        engine = HybridParallel(gpt(), rank.comm, Plan(2, 2), optimizer=OPTIMIZERS["sgd"])
        engines[rank.index] = engine
        if rank.index == 2:
            p = engine.stages[0].get_parameter("embedding.position.weight")
            p.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), math.inf))
        engine.step(batches()[0])

    engines: dict[int, HybridParallel] = {}
    with pytest.raises(NonFiniteGradient, match=r"^rank 2, step 0: the gradient of embedding.position.weight has"):
        World(4, "cpu").run(work)
    for index, engine in engines.items():
        for stage in engine.stages.values():
            assert all(p.isfinite().all() for p in stage.parameters())
            if index % 2 == 0:
                assert_same(stage.state_dict(), {key: gpt().state_dict()[key] for key in stage.state_dict()})


# --- several runs, and from plan to plan -----------------------------------------------------------------------------

PLANS = [
    Plan(2, 2, 2, num_microbatches=2),
    Plan(2, 1, 2, zero=3, sequence_parallel=True),
    Plan(1, 2, 2, (1,), "zero_bubble", 3),
    Plan(3, zero=2),
    Plan(1, 2, 1, None, "interleaved", 2, 1),
    Plan(),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_steps_of_several_runs_are_those_of_one_to_the_bit(plan: Plan) -> None:
    model, world, data = gpt(), World(plan.num_ranks, "cpu"), batches(num_steps=4)
    want = train(model, plan, data, max_norm=0.3)
    trained = parallelize(model, world, plan, optimizer=OPTIMIZERS["sgd"], max_norm=0.3)
    assert trained.plan == plan
    assert trained.world is world
    assert set(trained.engines) == {*range(plan.num_ranks)}
    losses = [trained.step(data[0])]
    losses += trained.steps(data[1:3])
    losses += [trained.step(batch) for batch in data[3:]]
    assert losses == want.losses
    assert trained.steps([]) == []
    assert trained.num_steps == len(data)
    assert_same(trained.full_state_dict(), want.weights)
    assert_same(model.state_dict(), snapshot(gpt()))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_in_another_run_every_axis_goes_on_there(plan: Plan) -> None:
    """A message over a communicator of the run before would be in that one's ledger."""
    engines: dict[int, HybridParallel] = {}

    def start(rank: Rank) -> list[Any]:
        engine = engines[rank.index] = HybridParallel(gpt(), rank.comm, plan, max_norm=0.3)
        engine.step(batches()[0])
        before = len(rank.comm.ledger.messages)
        engine.step(batches()[1])
        return [m[:6] for m in rank.comm.ledger.messages[before:]]

    def go_on(rank: Rank) -> list[Any]:
        engines[rank.index].connect(rank.comm)
        engines[rank.index].step(batches()[2])
        return [m[:6] for m in rank.comm.ledger.messages]

    assert World(plan.num_ranks, "cpu").run(start) == World(plan.num_ranks, "cpu").run(go_on)


def test_the_timeline_of_a_step_is_that_of_its_run() -> None:
    world = World(2, "cpu")
    trained = parallelize(gpt(), world, Plan(1, 2, num_microbatches=3))
    trained.steps(batches()[:2])
    trained.step(batches()[2])
    names = [event.name for event in world.timeline.events if event.rank == 0]
    assert names.count("update") == 1
    assert sum(name.startswith("forward") for name in names) == 3


@pytest.mark.parametrize("plan", [Plan(2), Plan(pp=2), Plan(2, zero=3)], ids=str)
def test_connect_refuses_another_rank(plan: Plan) -> None:
    engines: dict[int, HybridParallel] = {}

    def start(rank: Rank) -> None:
        engines[rank.index] = HybridParallel(gpt(), rank.comm, plan)

    def go_on(rank: Rank) -> None:
        with pytest.raises(MplabError, match=f"connect to rank {rank.index} of 2: this is rank {1 - rank.index} of 2"):
            engines[1 - rank.index].connect(rank.comm)

    World(2, "cpu").run(start)
    World(2, "cpu").run(go_on)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_go_from_plan_to_plan(tied: bool) -> None:
    """A step under each; SGD without momentum has no state of its own."""
    sgd = partial(torch.optim.SGD, lr=0.3)
    data = [*batches(), *batches(seed=2)][: len(PLANS)]
    want, losses, state = serially(gpt(tied), data, sgd), [], gpt(tied).state_dict()
    for plan, batch in zip(PLANS, data, strict=True):
        model = gpt(tied, seed=9)
        trained = parallelize(model, World(plan.num_ranks, "cpu"), plan, optimizer=sgd)
        trained.load_full_state_dict(state)
        assert_same(trained.full_state_dict(), state)
        losses.append(trained.step(batch))
        state = trained.full_state_dict()
        model.load_state_dict(state)
        gpt.cache_clear()
    assert losses == pytest.approx(want.losses, rel=0, abs=TOLERANCE)
    assert_same(state, want.weights, TOLERANCE)


def test_a_state_is_copies() -> None:
    for plan in (Plan(1, 2), Plan(2, zero=3), Plan(tp=2), Plan()):
        trained = parallelize(gpt(), World(plan.num_ranks, "cpu"), plan)
        for value in trained.full_state_dict().values():
            value.zero_()
        assert_same(trained.full_state_dict(), gpt().state_dict())


@pytest.mark.parametrize("plan", [*PLANS, Plan(pp=2), Plan(2, zero=1)], ids=str)
def test_a_state_of_another_model_is_refused_and_nothing_changes(plan: Plan) -> None:
    trained = parallelize(gpt(), World(plan.num_ranks, "cpu"), plan)
    state = {name: torch.zeros_like(value) for name, value in gpt().state_dict().items()}
    last, first = list(state)[-1], next(iter(state))
    for other in (
        {name: value for name, value in state.items() if name != last},
        state | {"more": torch.zeros(1)},
        state | {"head.norm.bias": torch.zeros(3)},
        state | {first: torch.zeros(8, 17)},
    ):
        with pytest.raises(MplabError, match=r"load|take"):
            trained.load_full_state_dict(other)
        assert_same(trained.full_state_dict(), gpt().state_dict())


def test_buffers_are_those_of_the_first_replica_on_every_rank() -> None:
    """Each replica's BatchNorm has seen its own samples."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    batch = inputs, torch.randint(4, (6,), generator=generator)

    def work(rank: Rank, zero: int) -> dict[str, Tensor]:
        engine = HybridParallel(model, rank.comm, Plan(2, zero=zero))
        engine.step(batch)
        return engine.full_state_dict()

    seen = model[0](inputs[:3]).mean(0).detach() * 0.1
    for stage in range(4):
        states = World(2, "cpu").run(partial(work, zero=stage))
        assert_same(states[1], states[0])
        torch.testing.assert_close(states[0]["1.running_mean"], seen)


# --- what each axis carries ------------------------------------------------------------------------------------------

AXES = "dp", "pp", "tp"


@dataclass(frozen=True)
class Sent:
    """In the second step, by rank: on each axis, and on the whole mesh."""

    rank: int
    place: dict[str, int]
    on: dict[str, list[Message]]
    lengths: list[int]  # of this rank's parameters, in their order


def second_step(plan: Plan, model: nn.Module, max_norm: float | None = None) -> list[Sent]:
    mesh = Mesh(plan.dp, plan.pp, plan.tp)

    def work(rank: Rank) -> Sent:
        engine = HybridParallel(model, rank.comm, plan, max_norm=max_norm)
        engine.step(batches(16)[0])
        start = len(rank.comm.ledger.messages)
        engine.step(batches(16)[1])
        messages = rank.comm.ledger.messages[start:]
        groups = {axis: next(tuple(g) for g in mesh.groups(axis) if rank.index in g) for axis in AXES}
        groups["all"] = tuple(range(rank.size))
        on = {axis: [m for m in messages if m.group == group] for axis, group in groups.items()}
        assert sum(map(len, on.values())) == len(messages), "nothing goes anywhere else"
        lengths = [] if plan.zero > 1 else [p.numel() for stage in engine.stages.values() for p in stage.parameters()]
        return Sent(rank.index, mesh.coordinates(rank.index), on, lengths)

    return World(plan.num_ranks, "cpu").run(work)


def assert_traffic(messages: Sequence[Message], want: Traffic) -> None:
    """Messages and bytes sent, and bytes received."""
    got = [sum(counts) for counts in zip((0, 0, 0), *(m[3:6] for m in messages), strict=True)]
    assert got == [want.num_sent, want.sent_bytes, want.received_bytes]


def of_data(plan: Plan, sent: Sent) -> Traffic:
    """Gradients (and weights) of one bucket or flat, and the message that closes the step."""
    rank = sent.place["dp"]
    if plan.zero:
        return sharded_traffic(1, plan.dp, rank, [sent.lengths], ITEM_BYTES)
    return data_parallel_traffic(plan.dp, rank, [sent.lengths], ITEM_BYTES)


def of_pipeline(plan: Plan, sent: Sent, num_samples: int, tied_elements: int) -> Traffic:
    """Activations and their gradients, a tied weight's, and the loss."""
    rank, length = sent.place["pp"], LENGTH // plan.tp if plan.sequence_parallel else LENGTH
    activation = num_samples * length * WIDTH * ITEM_BYTES
    schedule = build(plan.schedule, plan.pp, plan.num_microbatches)
    traffics = [pipeline_traffic(schedule, rank, [activation] * (plan.num_stages - 1))]
    if tied_elements:
        traffics.append(direct_traffic("all_reduce", rank, [tied_elements // 2 * ITEM_BYTES] * 2))
    root = schedule.rank_of[schedule.num_stages - 1]
    return total_traffic([*traffics, direct_traffic("broadcast", rank, [8] * 2, root)])


def of_tensors(plan: Plan, rank: int, num_samples: int) -> Traffic:
    return tensor_parallel_traffic(
        Block(num_samples, LENGTH, WIDTH, 4, 2, ITEM_BYTES),
        plan.tp,
        rank,
        plan.sequence_parallel,
        plan.num_microbatches,
        context_length=LENGTH + 1,
    )


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(("tied", "schedule"), [(True, "1f1b"), (False, "interleaved")])
def test_what_data_and_pipeline_axes_carry(zero: int, tied: bool, schedule: str) -> None:
    plan = Plan(2, 2, 1, None, schedule, 4, zero)
    for sent in second_step(plan, gpt(tied)):
        assert_traffic(sent.on["dp"], of_data(plan, sent))
        assert_traffic(sent.on["pp"], of_pipeline(plan, sent, 8, 8 * WIDTH if tied else 0))
        assert not sent.on["all"]
        assert {m.op for m in sent.on["dp"]} == (
            {"reduce_scatter", "all_gather_", "all_reduce_"} if zero else {"all_reduce_coalesced_", "all_reduce_"}
        )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("zero", [0, 1])
def test_what_data_and_tensor_axes_carry(zero: int, sequence_parallel: bool) -> None:
    plan = Plan(2, 1, 2, None, "1f1b", 2, zero, sequence_parallel)
    for sent in second_step(plan, gpt()):
        assert_traffic(sent.on["dp"], of_data(plan, sent))
        assert_traffic(sent.on["tp"], of_tensors(plan, sent.place["tp"], 8))
        assert not sent.on["all"]
        assert ("reduce_scatter" in {m.op for m in sent.on["tp"]}) == sequence_parallel


@pytest.mark.parametrize("zero", [2, 3])
def test_what_sharded_replicas_of_what_is_cut_carry(zero: int) -> None:
    plan, model = Plan(2, 1, 2, num_microbatches=2, zero=zero), gpt(False)
    whole = dict(model.named_parameters())
    cut = [{name: p.shape for name, p in whole.items() if name.startswith(part)} for part in PARTS]
    for sent in second_step(plan, model):
        lengths = [[math.prod(shape) // (2 if is_cut(name) else 1) for name, shape in of.items()] for of in cut]
        assert_traffic(sent.on["dp"], sharded_traffic(zero, 2, sent.place["dp"], lengths, ITEM_BYTES, 2))
        assert_traffic(sent.on["tp"], of_tensors(plan, sent.place["tp"], 8))
        assert not sent.on["all"]


PARTS = "embedding", "blocks.0", "blocks.1", "head"


def is_cut(name: str) -> bool:
    """Of a GPT by its own plan: all but norms, positions, and the biases of layers that are cut by rows."""
    return "norm" not in name and "position" not in name and not name.endswith(("output.bias", "down.bias"))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_what_pipeline_and_tensor_axes_carry(tied: bool, sequence_parallel: bool) -> None:
    """All stages together have the collectives of the whole model on their tensor axes."""
    plan = Plan(1, 2, 2, None, "1f1b", 4, 0, sequence_parallel)
    ranks = second_step(plan, gpt(tied))
    for sent in ranks:
        assert_traffic(sent.on["pp"], of_pipeline(plan, sent, 16, 8 * WIDTH // 2 if tied else 0))
        assert not sent.on["all"]
    for t in range(2):
        messages = [m for sent in ranks if sent.place["tp"] == t for m in sent.on["tp"]]
        again = direct_traffic("all_reduce", t, [0, 0])  # the gradients of what is not cut go in a message a stage
        assert_traffic(messages, total_traffic([of_tensors(plan, t, 16), *([again] if sequence_parallel else [])]))


@pytest.mark.parametrize("plan", [Plan(2, 2), Plan(2, 1, 2), Plan(1, 2, 2), Plan(2, 2, zero=1)], ids=str)
def test_a_norm_over_all_ranks_is_one_message_of_eight_bytes(plan: Plan) -> None:
    for sent, without in zip(second_step(plan, gpt(), 0.1), second_step(plan, gpt()), strict=True):
        assert [m.op for m in sent.on["all"]] == ["all_reduce_"]
        assert_traffic(sent.on["all"], direct_traffic("all_reduce", sent.rank, [8, 0, 0, 0]))
        for axis in AXES:
            assert [m[:6] for m in sent.on[axis]] == [m[:6] for m in without.on[axis]]


# --- the command line ------------------------------------------------------------------------------------------------

TINY = ["train", "--width", "16", "--layers", "2", "--sequence", "16", "--batch-size", "9", "--steps", "3"]


@pytest.fixture
def no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place for bars; and no launcher."""
    monkeypatch.setenv("MPLAB_ORDERED_OUTPUT", "1")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_notebook")
@pytest.mark.parametrize(
    ("plan", "data"), [(Plan(2, 2, 2, zero=1, num_microbatches=2), "text"), (Plan(2, 2, zero=1), "digits")], ids=str
)
def test_a_plan_trains_from_the_command_line(
    plan: Plan, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.save(tmp_path / "plan.json")
    arguments = [*TINY, "--data", data, "--device", "cpu", "--plan", str(tmp_path / "plan.json")]
    arguments += ["--save", str(tmp_path / "runs"), "--trace", str(tmp_path / "new" / "folder")]
    status = command_line.main([*arguments, "--check-serial"])
    said, errors = capsys.readouterr()
    assert status == 0, errors
    assert f"{plan}\n" in said
    assert f"World of {plan.num_ranks} ranks: " in said
    for expected in (
        "first loss ",
        " after 3 steps, ",
        " a step (median)\n",
        "against serial training: the losses differ",
    ):
        assert expected in said
    assert errors == ""  # no bar where nobody looks
    (trace,) = (tmp_path / "new" / "folder").iterdir()
    assert str(trace) in said
    events = json.loads(trace.read_text())["traceEvents"]
    names = [(event.get("name"), event.get("pid"), event.get("tid")) for event in events]
    assert sum(name == "update" for name, *_ in names) == plan.num_ranks  # the last step alone, and not what saved it


@pytest.mark.usefixtures("no_notebook")
def test_losses_that_are_not_those_of_serial_training_are_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Plan(2).save(tmp_path / "plan.json")
    step = Serial.step
    monkeypatch.setattr(Serial, "step", lambda serial, batch: 1.01 * step(serial, batch))
    arguments = [*TINY, "--device", "cpu", "--plan", str(tmp_path / "plan.json")]
    assert command_line.main([*arguments, "--check-serial"]) == 1
    assert "more than 0.001" in capsys.readouterr().out
    assert command_line.main(arguments) == 0
    assert "serial" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_notebook")
@pytest.mark.parametrize(
    ("arguments", "plan", "message"),
    [
        (["--check-serial"], None, "--check-serial is for training by a plan: give --plan FILE too"),
        (["--trace", "x"], None, "--trace is for training by a plan"),
        (["--plan", "none.json"], None, "none.json is no file: give the path of a plan"),
        ([], '{"dp": 0, "zero": 5}', "this plan can't be:\n  dp=0: must be"),
        ([], '{"gpus": 8}', "a plan has not ['gpus']"),
        ([], '{"tp": 3, "pp": 9}', "does not fit:\n  9 stages of 4 layers"),
        ([], '{"dp": 16}', "a batch of 9 samples for 16 replicas"),
        (["--lr", "1e30"], '{"dp": 2}', "lower"),
        (["--device", "toaster"], '{"dp": 2}', "--device toaster is no device"),
    ],
)
def test_a_mistake_is_told_with_status_2(
    arguments: list[str], plan: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan)
        arguments = [*arguments, "--plan", str(tmp_path / "plan.json")]
    assert command_line.main([*TINY, *([] if "--device" in arguments else ["--device", "cpu"]), *arguments]) == 2
    said, errors = capsys.readouterr()
    assert errors.startswith("mplab train: ")
    assert message in errors
    assert "last loss" not in said
