"""Every strategy at once is serial training: whatever the mesh, the schedule and what is sharded.

Every loss, every merged gradient after the last step, and the weights then, on every rank; all of these the same to the
bit on all ranks. SGD, so that a gradient of a wrong scale shows, but where a test says otherwise. Three steps: the
second is the first that the optimizer's memory counts in; of a few plans ten.
"""

from __future__ import annotations

import copy
import itertools
import math
import types
from functools import cache, partial
from typing import Any

import data_parallel
import pytest
import torch
from hybrid import (
    LENGTH,
    NUM_SAMPLES,
    NUM_STEPS,
    OPTIMIZERS,
    TOLERANCE,
    Trained,
    assert_alike,
    assert_same,
    batches,
    check,
    frozen_gpt,
    gpt,
    seeded,
    serial,
    serially,
    smoothed,
    train,
)
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import nn

from mplab import Mesh, Plan, World
from mplab.parallel import HybridParallel, vocab_parallel_cross_entropy
from mplab.plan.schedule import ORDERS
from mplab.world import Rank

# --- every mesh of up to 8 ranks -------------------------------------------------------------------------------------

MESHES = [mesh for mesh in itertools.product(range(1, 9), repeat=3) if math.prod(mesh) <= 8]


@cache
def serial_gpt(options: tuple[tuple[str, int], ...], max_norm: float | None) -> Trained:
    model = gpt(**dict(options))
    return serially(model, batches(vocabulary=model.config.vocab_size), max_norm=max_norm)


def mixed(dp: int, pp: int, tp: int) -> Plan:
    """Something of everything that this mesh can have, another mixture for another mesh."""
    index = MESHES.index((dp, pp, tp))
    schedule = list(ORDERS)[index % 5]
    return Plan(
        dp,
        pp,
        tp,
        None,
        schedule if pp > 1 or schedule != "interleaved" else "gpipe",
        num_microbatches=2 + index % 2 if pp > 1 else min(1 + index % 3, NUM_SAMPLES // dp),
        zero=index % 2 if pp > 1 else index % 4,
        sequence_parallel=tp > 1 and not LENGTH % tp and index % 3 > 0,
        recompute=pp > 1 and index % 3 == 1,
    )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_of_up_to_8_ranks(mesh: tuple[int, int, int]) -> None:
    plan = mixed(*mesh)
    heads = {3: 6, 5: 5, 6: 6, 7: 7, 8: 8}.get(plan.tp, 4)
    options = {"num_layers": max(1, plan.num_stages - 2), "num_heads": heads, "width": 2 * heads}
    options["tied"] = sum(mesh) % 2
    model, max_norm = gpt(**options), 0.3 if mesh[0] % 2 else None
    got = train(model, plan, batches(vocabulary=model.config.vocab_size), max_norm=max_norm)
    assert_alike(got, serial_gpt(tuple(options.items()), max_norm))


def test_the_mixtures_leave_nothing_out() -> None:
    plans = [mixed(*mesh) for mesh in MESHES]
    assert len(plans) == 38
    assert {plan.schedule for plan in plans if plan.pp > 1} == set(ORDERS)
    for tp in (1, 2):
        assert {plan.zero for plan in plans if (plan.tp > 1) == (tp > 1)} == {0, 1, 2, 3}
    assert {(plan.sequence_parallel, plan.recompute) for plan in plans} == {*itertools.product((True, False), repeat=2)}


# --- every setting ---------------------------------------------------------------------------------------------------

SETTINGS: list[tuple[str, Plan, dict[str, Any]]] = [
    ("untied", Plan(2, 2, 2, schedule="naive", num_microbatches=3, zero=1), {"max_norm": 0.1}),
    ("tied", Plan(2, 2, 2, schedule="gpipe", num_microbatches=3, sequence_parallel=True), {"max_norm": 0.1}),
    ("tied", Plan(2, 2, 2, (1,), "1f1b", 2, 1, True, True), {"optimizer": "adamw"}),
    ("tied", Plan(1, 2, 2, None, "interleaved", 2, 0, True, True), {"max_norm": 0.1}),
    ("untied", Plan(2, 2, 1, (1, 2, 3), "interleaved", 3, 1), {"max_norm": 0.1, "optimizer": "adamw"}),
    ("tied", Plan(2, 2, 2, (3,), "zero_bubble", 3, 1, True), {"max_norm": 0.1}),
    ("untied", Plan(1, 3, 2, None, "zero_bubble", 4, 0, False, True), {}),
    ("tied", Plan(1, 4, 2, None, "zero_bubble", 5, 0), {"optimizer": "adamw"}),
    ("tied", Plan(1, 1, 2, recompute=True, num_microbatches=2, zero=1), {}),
    ("tied", Plan(2, 1, 1, recompute=True, num_microbatches=8), {"max_norm": 0.1}),
    ("tied", Plan(schedule="interleaved", num_microbatches=2), {}),  # of one rank: it has one stage
    ("untied", Plan(2, schedule="interleaved", zero=1), {"max_norm": 100.0}),  # no gradient is so long
]


@pytest.mark.parametrize(("name", "plan", "options"), SETTINGS, ids=lambda value: str(value))
def test_every_setting(name: str, plan: Plan, options: dict[str, Any]) -> None:
    check(name, plan, **options)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(2, 2, 2, (2,), "1f1b", 3, 1, True),
        Plan(1, 2, 2, (2,), "zero_bubble", 2),
        Plan(2, 1, 2, zero=3),
    ],
    ids=str,
)
def test_ten_steps(plan: Plan) -> None:
    data = batches(num_steps=10)
    assert len(data) == 10
    assert_alike(train(gpt(), plan, data), serial("tied", num_steps=10))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_stage_of_zero_among_replicas_of_what_is_cut(zero: int, sequence_parallel: bool) -> None:
    plan = Plan(2, 1, 2, num_microbatches=2, zero=zero, sequence_parallel=sequence_parallel)
    check("untied" if zero % 2 else "tied", plan, max_norm=0.1)
    if zero > 1 and sequence_parallel:
        check("tied", plan, optimizer="adamw")


LLAMA = [
    Plan(2, 2, 2, zero=1, num_microbatches=2, sequence_parallel=True),
    Plan(1, 2, 4, None, "interleaved", 2, 0, False, True),
    Plan(1, 4, 1, None, "zero_bubble", 3),
    Plan(2, 1, 2, zero=3),
    Plan(3, 1, 1, zero=2, num_microbatches=2),
    Plan(1, 1, 4, sequence_parallel=True),
]


@pytest.mark.parametrize("plan", LLAMA, ids=str)
def test_a_llama_of_hugging_face(plan: Plan) -> None:
    check("Llama", plan, max_norm=0.3 if plan.tp > 1 else None)


def test_a_norm_that_counts_a_parameter_twice_would_show() -> None:
    """So that the tests above are none of clipping that is never reached."""
    lengths = [
        torch.cat([x.flatten() for x in {id(x): x for x in (want.gradients or {}).values()}.values()]).norm()
        for want in (serial(name, "sgd", 0.1) for name in ("tied", "untied"))
    ]
    assert torch.stack(lengths).tolist() == pytest.approx([0.1, 0.1], rel=1e-4)


@pytest.mark.parametrize("zero", [0, 1])
def test_copies_of_a_weight_in_two_stages_of_one_rank_count_once(zero: int) -> None:
    model = seeded(lambda: nn.Sequential(*(nn.Linear(4, 4, bias=i > 2) for i in range(4))))
    model[2].weight = model[0].weight
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    data = [(x, torch.randint(4, (6,), generator=generator)) for x in xs]
    plan = Plan(2, 2, cuts=(1, 2, 3), schedule="interleaved", num_microbatches=2, zero=zero)
    assert_alike(train(model, plan, data, max_norm=0.1), serially(model, data, max_norm=0.1))


def test_the_smallest_batch_and_one_sample_more() -> None:
    plan = Plan(2, 2, 1, num_microbatches=3, zero=1)
    for num_samples in (6, 7):
        got = train(gpt(), plan, batches(num_samples))
        assert_alike(got, serial("tied", num_samples=num_samples))


def test_in_a_world_where_each_send_waits_for_its_receive() -> None:
    world = World(8, "cpu", rendezvous=True)
    for plan in (Plan(2, 2, 2, num_microbatches=3, zero=1), Plan(2, 2, 2, None, "interleaved", 2, 0, True, True)):
        assert_alike(train(gpt(), plan, batches(), world), serial("tied"))


# --- parameters that are not trained, or not used --------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        Plan(2, 2, 2, (2,), zero=1, num_microbatches=2),
        Plan(1, 2, 1, (2,), schedule="zero_bubble", num_microbatches=3),
        Plan(1, 2, 2, (2,), recompute=True, sequence_parallel=True),
        Plan(2, 1, 2, zero=3, sequence_parallel=True),
    ],
    ids=str,
)
def test_what_is_frozen_stays(plan: Plan) -> None:
    model = frozen_gpt()
    got = train(model, plan, batches(), max_norm=0.1)
    assert_alike(got, serially(model, batches(), max_norm=0.1))
    assert torch.equal(got.weights["blocks.0.mlp.up.weight"], model.blocks[0].mlp.up.weight)
    if got.gradients is not None:
        assert list(got.gradients) == [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_tied_weight_that_is_frozen_stays() -> None:
    model = copy.deepcopy(gpt())
    model.embedding.token.requires_grad_(False)
    assert_alike(train(model, Plan(2, 2, 2, zero=1), batches()), serially(model, batches()))


@pytest.mark.parametrize("plan", [Plan(2, 2, 1, num_microbatches=2), Plan(2, 2, zero=1), Plan(3, zero=3)], ids=str)
@pytest.mark.parametrize("variant", ["unused", "frozen", "used twice", "tied"])
def test_parameters_that_no_sample_comes_to(variant: str, plan: Plan) -> None:
    """AdamW would let a weight without a gradient shrink if it had one of zeros."""
    data = data_parallel.batches()[:NUM_STEPS]
    got = train(data_parallel.model(variant), plan, data, optimizer=data_parallel.OPTIMIZERS["adamw"])
    want = data_parallel.serial(variant, "adamw", num_steps=NUM_STEPS)
    assert got.losses == pytest.approx(want.losses, rel=0, abs=TOLERANCE)
    assert_same(got.weights, want.weights[-1], TOLERANCE)


@pytest.mark.parametrize("zero", [0, 1])
def test_parameters_that_the_samples_of_some_replicas_come_to(zero: int) -> None:
    data = data_parallel.batches()[:NUM_STEPS]
    model = data_parallel.model("branch")
    got = train(model, Plan(4, zero=zero), data, optimizer=data_parallel.OPTIMIZERS["adamw"], max_norm=0.5)
    want = data_parallel.serial("branch", "adamw", num_steps=NUM_STEPS, max_norm=0.5)
    assert got.losses == pytest.approx(want.losses, rel=0, abs=TOLERANCE)
    assert_same(got.weights, want.weights[-1], TOLERANCE)


@pytest.mark.parametrize("zero", [0, 1])
def test_parameters_that_nobody_uses_of_a_model_that_is_cut(zero: int) -> None:
    model = copy.deepcopy(gpt())
    model.forgotten = seeded(lambda: nn.Linear(3, 3))
    plan = Plan(2, 1, 2, zero=zero)
    got = train(model, plan, batches(), optimizer=OPTIMIZERS["adamw"], max_norm=0.1)
    assert_alike(got, serially(model, batches(), OPTIMIZERS["adamw"], max_norm=0.1))
    assert torch.equal(got.weights["forgotten.weight"], model.forgotten.weight)


# --- losses of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", [Plan(2, 2, 1, num_microbatches=3), Plan(2, zero=3), Plan(2, 1, 2), Plan(1, 2, 2)], ids=str
)
def test_a_loss_of_ones_own(plan: Plan) -> None:
    options: dict[str, Any] = {"loss_fn": smoothed}
    if plan.tp > 1:  # it needs the logits whole
        up_and_down = {"blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row"}
        options["tensor_plan"] = types.MappingProxyType({**up_and_down, "head.projection": "column_gather"})
    got = train(gpt(False), plan, batches(), **options)
    assert_alike(got, serially(gpt(False), batches(), loss_fn=smoothed))


def test_a_loss_that_takes_logits_that_are_cut() -> None:
    plan = Plan(2, 2, 2)

    def work(rank: Rank) -> list[float]:
        axis = Mesh(2, 2, 2).connect(rank.comm).tp
        loss_fn = partial(vocab_parallel_cross_entropy, comm=axis, label_smoothing=0.1)
        engine = HybridParallel(gpt(), rank.comm, plan, loss_fn, OPTIMIZERS["sgd"])
        return [engine.step(batch) for batch in batches()]

    want = serially(gpt(), batches(), loss_fn=smoothed).losses
    for losses in World(8, "cpu").run(work):
        assert losses == pytest.approx(want, rel=0, abs=TOLERANCE)
