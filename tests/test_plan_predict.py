"""What one plan should take: by hand, against the formulas of one axis, real ledgers and played schedules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
from limits import leaves_nothing_behind as leaves_nothing_behind
from planner import FAST, FOUR, ONE, SLOW, SMALL, gpt, numbers
from torch import nn

from mplab import MplabError, World
from mplab.models import layers
from mplab.parallel import data as data_module
from mplab.parallel.buckets import make_buckets
from mplab.parallel.hybrid import HybridParallel
from mplab.plan.cost import Link
from mplab.plan.data import data_parallel_traffic, sharded_traffic
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.partition import by_parameters
from mplab.plan.schedule import build
from mplab.plan.search import predict
from mplab.plan.share import BUCKET_BYTES, buckets, memory_of, pipeline_calls
from mplab.plan.stages import num_updated, share_of
from mplab.plan.tensor import Block, block_flops, tensor_parallel_traffic
from mplab.plan.tensor import activation_bytes as block_activation_bytes
from mplab.plan.traffic import direct_traffic, pipeline_traffic
from mplab.plan.transformer import layer_loads, parameter_lengths
from mplab.plan.zero import peak, zero_memory, zero_moments
from mplab.world import Rank


def test_one_device_by_hand() -> None:
    """No messages; arithmetic, a launch for each of 6 layers and micro-batches, and 28 bytes for each weight."""
    machine = replace(ONE, launch_s=0.5)
    found = predict(Plan(num_microbatches=2), SMALL, 6, machine)
    flops = 4 * block_flops(Block(6, 8, 16, 4)) + 6 * 6 * 8 * 16 * 16
    assert found.compute_s == pytest.approx(flops / 1e9 + 2 * 6 * 0.5)
    assert found.update_s == pytest.approx(SMALL.num_parameters * (3 * 4 + 2 * 8) / 1e9)
    assert found.step_s == pytest.approx(found.compute_s + found.update_s)
    assert (found.bubble_s, found.tensor_s, found.pipeline_s, found.data_s) == (0, 0, 0, 0)
    assert (found.tensor_bytes, found.pipeline_bytes, found.data_bytes) == (0, 0, 0)
    block = block_activation_bytes(Block(3, 8, 16, 4), 1)
    assert found.memory == replace(
        zero_memory([[SMALL.num_parameters]], 0, 1), activations_bytes=4 * block + layer_loads(SMALL, 3, 1, False)[2][3]
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_data_bytes_are_those_of_the_axis(zero: int, tied: bool) -> None:
    model, sizes = gpt(tied)
    found = predict(Plan(dp=4, zero=zero, num_microbatches=3), sizes, 12, FOUR)
    lengths = [p.numel() for p in model.parameters()]
    if zero == 0:
        want = data_parallel_traffic(4, 0, [lengths])  # all in one bucket
    elif zero == 1:
        want = sharded_traffic(1, 4, 0, [lengths])
    else:
        parts = [[p.numel() for _, p in layer.named_parameters()] for layer in layers(model)]
        shared = [parts[0].pop(0), parts[-1].pop()][:1] if tied else []
        want = sharded_traffic(zero, 4, 0, parts, 4, 3, shared)
    assert found.data_bytes == want.sent_bytes
    assert found.tensor_bytes == found.pipeline_bytes == 0
    if zero < 2:  # nothing hides them
        assert found.data_s == pytest.approx(FAST.time_s(want.num_sent, want.sent_bytes))
    else:
        assert 0 < found.data_s <= FAST.time_s(want.num_sent, want.sent_bytes)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_bytes_are_those_of_the_axis(sequence_parallel: bool) -> None:
    plan = Plan(tp=4, num_microbatches=2, sequence_parallel=sequence_parallel)
    found = predict(plan, SMALL, 6, FOUR)
    want = tensor_parallel_traffic(Block(6, 8, 16, 4, 4), 4, 0, sequence_parallel, 2)
    assert found.tensor_bytes == want.sent_bytes
    assert found.tensor_s == pytest.approx(FAST.time_s(want.num_sent, want.sent_bytes))
    assert found.data_bytes == found.pipeline_bytes == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("pp", "schedule"), [(2, "1f1b"), (2, "interleaved"), (3, "gpipe"), (3, "interleaved")])
def test_pipeline_bytes_are_those_of_the_axis(pp: int, schedule: str, tied: bool) -> None:
    plan, model = Plan(pp=pp, schedule=schedule, num_microbatches=3 if pp == 3 else 2), replace(SMALL, tied=tied)
    found = predict(plan, model, 6, FOUR.with_ranks(pp))
    of_stages = [6 * 8 * 16 * 4] * (plan.num_stages - 1)
    order = build(schedule, pp, plan.num_microbatches)
    sent = [pipeline_traffic(order, rank, of_stages).sent_bytes for rank in range(pp)]
    sent[-1] += 8 * (pp - 1)  # the loss
    if tied:
        sent[0], sent[-1] = sent[0] + 16 * 16 * 4, sent[-1] + 16 * 16 * 4
    assert found.pipeline_bytes == max(sent)


LEDGERS = [
    Plan(4, 1, 1),
    Plan(2, 2, 1, num_microbatches=2, zero=1),
    Plan(1, 2, 2, num_microbatches=4, schedule="interleaved", sequence_parallel=True),
    Plan(1, 2, 2, num_microbatches=2, schedule="gpipe", recompute=True),
    Plan(1, 4, 1, num_microbatches=4, schedule="zero_bubble"),
    Plan(2, 1, 2, zero=3, num_microbatches=2, sequence_parallel=True),
    Plan(2, 1, 2, zero=2),
    Plan(1, 2, 2, cuts=(1,), num_microbatches=4, sequence_parallel=True, recompute=True),
    Plan(1, 2, 2, cuts=(5,), num_microbatches=2, sequence_parallel=True),
    Plan(4, 1, 1, zero=1),
    Plan(4, 1, 1, zero=2, num_microbatches=1),
    Plan(1, 1, 4, num_microbatches=2),
]


class Counted(NamedTuple):
    """Of a rank's step, on the axes data, pipeline, tensor; and what its optimizer has."""

    sent_bytes: list[int]
    calls: list[int]
    num_updated: int


def _count_a_step(rank: Rank, model: nn.Module, plan: Plan) -> Counted:
    trained = HybridParallel(model, rank.comm, plan)
    trained.step(numbers(4))
    num_before = len(rank.comm.ledger.messages)
    trained.step(numbers(4))
    messages = [m for m in rank.comm.ledger.messages[num_before:] if len(m.group) > 1]
    axes = [trained.axes.dp, trained.axes.pp, trained.axes.tp]
    of_axes = [[m for m in messages if {*m.group} <= {*axis.ranks}] for axis in axes]
    sent = [sum(m.sent_bytes for m in of_axis) for of_axis in of_axes]
    assert sum(sent) == sum(m.sent_bytes for m in messages)
    calls = [sum(m.op not in ("send", "recv") for m in of_axis) for of_axis in of_axes]
    assert trained.optimizer is not None
    return Counted(sent, calls, sum(len(group["params"]) for group in trained.optimizer.param_groups))


@pytest.mark.parametrize("plan", LEDGERS, ids=str)
def test_bytes_and_calls_of_every_axis_are_those_of_the_ledger(plan: Plan) -> None:
    model, sizes = gpt()
    sent, calls, num_updated = zip(*World(4, "cpu").run(_count_a_step, model, plan), strict=True)
    found = predict(plan, sizes, 4, FOUR)
    want = [found.data_bytes, found.pipeline_bytes, found.tensor_bytes]
    assert [max(of_axis) for of_axis in zip(*sent, strict=True)] == want

    free = replace(FOUR, flops_s=1e300, memory_bytes_s=math.inf, inside=Link(0, math.inf))
    of_data, of_pipeline, of_tensor = zip(*calls, strict=True)
    found = predict(plan, sizes, 4, replace(free, call_s=1.0))
    assert found.data_s == pytest.approx(max(of_data))
    assert found.tensor_s == pytest.approx(sum(of_tensor) / 4)  # the mean of the stages
    stages = share_of(plan, sizes, 4)
    assert pipeline_calls(stages) == max(of_pipeline)
    found = predict(plan, sizes, 4, replace(free, update_launch_s=1.0))
    assert found.update_s == pytest.approx(max(num_updated))
    assert found.step_s == pytest.approx(found.update_s)


@pytest.mark.parametrize("zero", [2, 3])
def test_messages_that_computing_hides(zero: int) -> None:
    """Computing that takes for ever hides all but the first gather, the last reduction, and what is there once."""
    slow, fast = (predict(Plan(4, zero=zero), SMALL, 16, replace(FOUR, flops_s=f)) for f in (1.0, 1e30))
    assert slow.data_s < fast.data_s
    parts = [sum(layer) for layer in parameter_lengths(SMALL)]
    of_layers, matrix = [parts[0] - 256, *parts[1:-1], parts[-1] - 256], 256

    def time_s(name: str, length: int, item_bytes: int = 4) -> float:
        traffic = direct_traffic(name, 0, [length // 4 * item_bytes] * 4)
        return FAST.time_s(traffic.num_sent, traffic.sent_bytes)

    num_parameters = 16 * 4 + 2 + 2
    once_s = time_s("all_gather", matrix) + time_s("all_reduce", 2 + num_parameters + 2, 8)
    once_s += time_s("reduce_scatter", matrix) + time_s("reduce_scatter", of_layers[0])
    # the embedding computes nothing, so what it could hide is not hidden: the gather and the reduction of block 0
    not_hidden_s = time_s("reduce_scatter", of_layers[1])
    if zero == 2:
        not_hidden_s += sum(time_s("all_gather", length) for length in of_layers)
    else:
        not_hidden_s += time_s("all_gather", of_layers[0]) + time_s("all_gather", of_layers[1])
    assert slow.data_s == pytest.approx(once_s + not_hidden_s, rel=0.01)


def test_buckets_are_those_of_data_parallelism() -> None:
    assert BUCKET_BYTES == data_module.BUCKET_BYTES
    parameters = list(gpt()[0].parameters())
    for size in (1, 4096, 5000, 1 << 20):
        want = [[p.numel() for p in bucket.parameters] for bucket in make_buckets(parameters, size)]
        assert buckets([p.numel() for p in parameters], 4, size) == want


@pytest.mark.parametrize("zero", [2, 3])
def test_memory_of_sharded_replicas_is_their_peak(zero: int) -> None:
    lengths = [[*layer] for layer in parameter_lengths(SMALL)]
    lengths[0].pop(0)
    lengths[-1].pop()
    kept = [load.kept_bytes for load in layer_loads(SMALL, 2, 1, False)]
    want = peak(
        zero_moments(lengths, zero, 4, 0, [kept[0], *[kept[1]] * 4, kept[2]], update_bytes=0, shared=[16 * 16])
    ).memory
    assert memory_of(Plan(4, zero=zero), SMALL, 8) == want
    chunks = sum(-(-sum(layer) // 4) for layer in (*lengths, [16 * 16]))
    more = memory_of(Plan(4, zero=zero, num_microbatches=2), SMALL, 16)
    assert more == replace(want, gradients_bytes=want.gradients_bytes + 4 * chunks)


def test_memory_of_a_pipeline_by_hand() -> None:
    """Layers 0 to 3 and 4 to 5: the first rank holds 2 micro-batches, the second 1."""
    kept = [load.kept_bytes for load in layer_loads(SMALL, 2, 1, False)]
    sizes = [sum(layer) for layer in parameter_lengths(SMALL)]
    assert by_parameters(sizes, 2).cuts == (3,)
    of_first = memory_of(Plan(pp=2, cuts=(4,), num_microbatches=4), SMALL, 8)
    want = zero_memory([[sum(sizes[:4])]], 0, 1)
    assert of_first == replace(want, activations_bytes=2 * 3 * kept[1])
    gpipe = memory_of(Plan(pp=2, cuts=(4,), num_microbatches=4, schedule="gpipe"), SMALL, 8)
    assert gpipe.activations_bytes == 4 * 3 * kept[1]
    again = memory_of(Plan(pp=2, cuts=(4,), num_microbatches=4, schedule="gpipe", recompute=True), SMALL, 8)
    assert again.activations_bytes == 3 * kept[1]  # its input is a part of the batch
    of_last = memory_of(Plan(pp=2, cuts=(1,), num_microbatches=4, schedule="gpipe", recompute=True), SMALL, 8)
    assert of_last.activations_bytes == 3 * (2 * 8 * 16 * 4) + 4 * kept[1] + kept[2]
    untied = memory_of(Plan(pp=2, cuts=(1,), num_microbatches=4), replace(SMALL, tied=False), 8)
    tied = memory_of(Plan(pp=2, cuts=(1,), num_microbatches=4), SMALL, 8)
    assert tied.parameters_bytes == untied.parameters_bytes == 4 * sum(sizes[1:])  # each rank has a matrix of its own


def test_sharding_the_state_alone() -> None:
    """Weights, gradients twice while they are joined, 1/4 of the state."""
    num = SMALL.num_parameters
    found = memory_of(Plan(4, zero=1), SMALL, 16)
    share = -(-num // 4) * 8
    activations = memory_of(Plan(4), SMALL, 16).activations_bytes
    assert activations > 4 * num
    assert found == replace(zero_memory([[num]], 0, 1), optimizer_bytes=share, activations_bytes=activations)
    few = replace(SMALL, context_length=1)  # tokens: nothing is kept of them, and joining is the peak
    num = few.num_parameters
    assert memory_of(Plan(4, zero=1), few, 4).gradients_bytes == 2 * 4 * num
    assert memory_of(Plan(1, zero=1), few, 4) == memory_of(Plan(1), few, 4)


def test_recomputing_takes_a_forward_more() -> None:
    plan = Plan(pp=2, num_microbatches=4)
    plain, again = (predict(replace(plan, recompute=r), SMALL, 8, FOUR.with_ranks(2)) for r in (False, True))
    assert again.compute_s == pytest.approx(plain.compute_s * 4 / 3)
    assert again.pipeline_bytes == plain.pipeline_bytes
    plan = replace(plan, tp=2)
    plain, again = (predict(replace(plan, recompute=r), SMALL, 8, FOUR) for r in (False, True))
    embedding, block, head = (load.forward for load in layer_loads(SMALL, 2, 2, False))
    forward_s = sum(n * FAST.time_s(*of[:2]) for n, of in ((1, embedding), (4, block), (1, head))) / 2
    assert again.tensor_s == pytest.approx(plain.tensor_s + 4 * forward_s)


def test_ranks_that_share_a_device_compute_one_after_another() -> None:
    for plan in (Plan(4), Plan(tp=4), Plan(pp=4, num_microbatches=4), Plan(2, 2, num_microbatches=2)):
        alone = predict(plan, SMALL, 8, FOUR)
        shared = predict(plan, SMALL, 8, replace(FOUR, num_devices=2, num_ranks=4))
        assert shared.compute_s == pytest.approx(2 * alone.compute_s)
        assert alone.update_s < shared.update_s <= 2 * alone.update_s + 1e-12
        assert (plan.pp > 1) or shared.update_s == pytest.approx(2 * alone.update_s)
        assert alone.step_s < shared.step_s <= 2 * alone.step_s + 1e-12
    piped = predict(Plan(pp=4, num_microbatches=4), SMALL, 8, replace(FOUR, num_devices=1, num_ranks=4))
    assert piped.bubble_s == pytest.approx(0, abs=1e-9)  # another rank computes whenever one waits


def test_launching_the_update_by_hand() -> None:
    """Two embeddings, 16 parameters a block, a norm's two, and the head's matrix, which is tied."""
    num = 2 + 4 * 16 + 2
    machine = replace(FOUR, memory_bytes_s=math.inf, update_launch_s=0.5)
    one_process = replace(machine, one_process=True)

    def update_s(machine: Machine, plan: Plan) -> float:
        return predict(plan, SMALL, 8, machine.with_ranks(plan.num_ranks)).update_s

    assert update_s(machine, Plan()) == update_s(one_process, Plan()) == 0.5 * num
    assert update_s(machine, Plan(4)) == update_s(machine, Plan(tp=4)) == 0.5 * num
    assert update_s(one_process, Plan(4)) == update_s(one_process, Plan(tp=4)) == 4 * 0.5 * num  # in turn
    assert update_s(one_process, Plan(2)) == 2 * 0.5 * num
    for shared in (replace(machine, num_devices=2), replace(one_process, num_devices=2)):
        assert update_s(shared, Plan(4)) == (4 if shared.one_process else 2) * 0.5 * num
    untied = predict(Plan(), replace(SMALL, tied=False), 8, machine.with_ranks(1))
    assert untied.update_s == 0.5 * (num + 1)


@pytest.mark.parametrize(("num_devices", "num_ranks", "turns"), [(4, 1, 1), (4, 2, 2), (4, 4, 4), (2, 4, 2), (1, 4, 1)])
def test_ranks_of_one_process_launch_in_turn(num_devices: int, num_ranks: int, turns: int) -> None:
    """Six layers, 0.5 s each: alone, beside others, and where ranks share devices, all of them one after another."""
    machine = replace(FOUR, num_devices=num_devices, num_ranks=num_ranks, flops_s=1e300, launch_s=0.5, one_process=True)
    assert machine.turns == turns
    assert predict(Plan(num_ranks), SMALL, 8, machine).compute_s == pytest.approx(num_ranks * 6 * 0.5)
    apart = replace(machine, one_process=False)
    assert apart.turns == 1
    assert predict(Plan(num_ranks), SMALL, 8, apart).compute_s == pytest.approx(apart.ranks_per_device * 6 * 0.5)


@pytest.mark.parametrize("one_process", [False, True])
def test_gradients_that_are_put_off_are_launched_by_themselves(one_process: bool) -> None:
    """Of the three layers of the last stage; the first splits nothing. A third of what they launch otherwise."""
    machine = replace(FOUR, num_devices=1, num_ranks=2, flops_s=1e300, launch_s=0.5, one_process=one_process)
    free = replace(machine, memory_bytes_s=math.inf, inside=Link(0, math.inf))
    naive, split = (predict(Plan(pp=2, schedule=name, cuts=(3,)), SMALL, 8, free) for name in ("naive", "zero_bubble"))
    assert naive.step_s == pytest.approx(6 * 0.5)
    assert split.step_s - naive.step_s == pytest.approx(3 * 0.5 / 3)


@pytest.mark.parametrize(
    ("dp", "pp", "num_devices", "num_seen"), [(1, 2, 2, 1), (1, 2, 1, 2), (1, 4, 4, 1), (1, 4, 2, 1), (2, 2, 1, 4)]
)
def test_a_stage_updates_while_another_computes(dp: int, pp: int, num_devices: int, num_seen: int) -> None:
    """The first is the last to end: only its update is seen, unless all share one device."""
    plan = Plan(dp, pp, schedule="naive")
    machine = replace(FOUR.with_ranks(dp * pp), num_devices=num_devices, inside=Link(0, math.inf), flops_s=1e6)
    of_rank_s = num_updated(share_of(plan, SMALL, 8), plan) * 28 / machine.memory_bytes_s
    found = predict(plan, SMALL, 8, machine)
    assert found.compute_s > 10 * of_rank_s
    assert found.update_s == pytest.approx(num_seen * of_rank_s)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_message_between_stages_takes_a_call_too(num_devices: int) -> None:
    """An output and its gradient; then the tied matrix, and the loss."""
    plan = Plan(pp=2, schedule="naive")
    machine = replace(FOUR.with_ranks(2), num_devices=num_devices, memory_bytes_s=math.inf)
    without, found = (predict(plan, SMALL, 8, replace(machine, call_s=c)) for c in (0.0, 0.25))
    assert found.pipeline_s - without.pipeline_s == pytest.approx(4 * 0.25 * 2 / num_devices)
    assert found.step_s - without.step_s == pytest.approx(4 * 0.25 * 2 / num_devices)


def test_each_axis_has_the_link_of_its_ranks() -> None:
    """Two hosts of two: neighbours on the tensor axis are in one host, replicas of whole pipelines in two."""
    machine = replace(FOUR, between=SLOW, devices_per_host=2)
    fast = replace(machine, between=FAST)
    for plan, slow_axes in (
        (Plan(2, 2), {"data"}),
        (Plan(2, 1, 2), {"data"}),
        (Plan(1, 2, 2), {"pipeline"}),
        (Plan(1, 4, 1), {"pipeline"}),
        (Plan(1, 1, 4), {"tensor"}),
        (Plan(4), {"data"}),
    ):
        found, other = predict(plan, SMALL, 8, machine), predict(plan, SMALL, 8, fast)
        slower = {
            axis
            for axis in ("data", "pipeline", "tensor")
            if getattr(found, f"{axis}_s") > 1.5 * getattr(other, f"{axis}_s")
        }
        assert slower == slow_axes, plan


@pytest.mark.parametrize(("plan", "num_messages"), [(Plan(1, 2, 2, schedule="naive"), 5), (Plan(2, 2), 0)], ids=str)
def test_all_messages_of_the_pipeline_leave_the_host_or_none(plan: Plan, num_messages: int) -> None:
    """An output, its gradient, the loss, and two of the tied matrix."""
    instant, slow = Link(0, math.inf), Link(1, math.inf)
    machine = replace(FOUR, inside=instant, between=slow, devices_per_host=2, memory_bytes_s=math.inf)
    assert predict(plan, SMALL, 8, machine).pipeline_s == pytest.approx(num_messages)


def test_the_bubble_is_the_schedules() -> None:
    """Blocks alone weigh here: stages of 2, 2 equal blocks, so (p - 1)/m of the computing."""
    model = replace(SMALL, num_layers=4, vocab_size=4)
    machine = replace(FOUR.with_ranks(2), flops_s=1e12, launch_s=0.0, inside=Link(0, math.inf))
    found = predict(Plan(pp=2, num_microbatches=8, cuts=(3,)), model, 16, machine)
    assert found.bubble_s / found.compute_s == pytest.approx(1 / 8, rel=0.05)
    assert found.pipeline_s == 0
    naive = predict(Plan(pp=2, num_microbatches=8, cuts=(3,), schedule="naive"), model, 16, machine)
    assert naive.bubble_s == pytest.approx(naive.compute_s)


@pytest.mark.parametrize(
    ("plan", "batch", "said"),
    [
        (Plan(4, num_microbatches=2), 7, ["7 samples for 4 replicas", "take 8"]),
        (Plan(tp=3), 8, ["tp=3 does not divide 4 heads", "tp=3 does not divide 16 tokens"]),
        (Plan(4, sequence_parallel=True), 8, ["sequence_parallel with tp=1"]),
        (Plan(pp=7), 8, ["7 stages of 6 layers"]),
        (Plan(pp=4, schedule="interleaved"), 8, ["8 stages of 6 layers"]),
        (Plan(pp=2, cuts=(6,)), 8, ["6 is out of range", "blocks.3"]),
        (Plan(pp=2, tp=3, cuts=(1, 2)), 0, ["0 samples", "3 does not divide 4", "2 stages have 1, not 2"]),
        (Plan(2), 8, ["2 ranks, and four has 4", "machine.with_ranks(2)"]),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit(plan: Plan, batch: int, said: list[str]) -> None:
    with pytest.raises(MplabError) as refused:
        predict(plan, SMALL, batch, FOUR)
    for words in said:
        assert words in str(refused.value)


def test_a_sequence_that_is_not_divided() -> None:
    with pytest.raises(MplabError, match="tp=4 does not divide a sequence of 6 tokens"):
        predict(Plan(tp=4, sequence_parallel=True), replace(SMALL, context_length=6), 8, FOUR)
