"""All plans: which there are, which is the best; what must hold for each, and for GPT-3 as it was trained."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import cache
from itertools import product

import pytest
from limits import leaves_nothing_behind as leaves_nothing_behind
from planner import CLUSTER, FOUR, HOSTS, SMALL, gpt

from mplab import MplabError
from mplab.models import cross_entropy
from mplab.parallel.hybrid import check_plan
from mplab.plan.cost import Link
from mplab.plan.layout import Plan
from mplab.plan.machines import MACHINES, Machine
from mplab.plan.schedule import ORDERS, build
from mplab.plan.search import Prediction, candidates, predict, search, table
from mplab.plan.transformer import GPT3, Transformer

GPT3_BATCH = 1536  # Narayanan et al. 2021, table 2


@cache
def all_predictions(machine: Machine) -> dict[Plan, Prediction]:
    return {plan: predict(plan, SMALL, 16, machine) for plan in candidates(SMALL, machine, 16)}


def test_candidates_are_what_can_run() -> None:
    model, sizes = gpt()
    found = list(candidates(sizes, FOUR, 8))
    assert len(set(found)) == len(found)
    for plan in found:
        check_plan(model, 4, plan, cross_entropy, None)
        assert 8 % (plan.dp * plan.num_microbatches) == 0


def test_candidates_are_all_that_can_run() -> None:
    """But those that another plan is as good as: by trying all values of all settings."""
    model, sizes = gpt()
    degrees = [(dp, pp, 4 // dp // pp) for dp, pp in product((1, 2, 4), repeat=2) if dp * pp <= 4]
    wanted = set()
    for (dp, pp, tp), schedule, m, zero, sequence_parallel, recompute in product(
        degrees, ORDERS, (1, 2, 4), range(4), (False, True), (False, True)
    ):
        try:
            values = {"schedule": schedule, "num_microbatches": m, "zero": zero, "recompute": recompute}
            plan = Plan(dp, pp, tp, sequence_parallel=sequence_parallel, **values)
            check_plan(model, 4, plan, cross_entropy, None)
            predict(plan, sizes, 4, FOUR)
        except MplabError:
            continue
        is_idle = (pp == 1 and schedule != "1f1b") or (dp == 1 and zero) or (schedule == "interleaved" and m % pp)
        is_idle |= m == 1 and pp > 1 and schedule in ("naive", "gpipe")  # what 1F1B does then
        is_vain = recompute and (pp == 1 or m == 1 or schedule == "naive")
        if not is_idle and not is_vain:
            wanted.add(plan)
    assert set(candidates(sizes, FOUR, 4)) == wanted


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_with_one_microbatch_three_orders_are_the_same(num_ranks: int) -> None:
    naive, gpipe, one_f_one_b = (build(order, num_ranks, 1).ranks for order in ("naive", "gpipe", "1f1b"))
    assert naive == gpipe == one_f_one_b


def test_what_is_left_out_is_no_better() -> None:
    for plan, other in (
        (
            Plan(pp=4, num_microbatches=4, schedule="naive", recompute=True),
            Plan(pp=4, num_microbatches=4, schedule="naive"),
        ),
        (Plan(pp=4, recompute=True), Plan(pp=4)),
        (Plan(1, 1, 4, zero=1), Plan(1, 1, 4)),
    ):
        left_out, taken = predict(plan, SMALL, 8, FOUR), predict(other, SMALL, 8, FOUR)
        assert left_out.step_s >= taken.step_s
        assert left_out.memory_bytes >= taken.memory_bytes


def test_the_tensor_axis_stays_in_a_host() -> None:
    model = replace(SMALL, num_heads=16)
    assert {plan.tp for plan in candidates(model, HOSTS, 16)} == {1, 2, 4}
    assert {plan.tp for plan in candidates(model, replace(HOSTS, devices_per_host=16), 16)} == {1, 2, 4, 8, 16}


def test_what_must_divide() -> None:
    def degrees(axis: str, model: Transformer, machine: Machine = FOUR, batch: int = 16) -> set[int]:
        return {getattr(plan, axis) for plan in candidates(model, machine, batch)}

    assert degrees("tp", replace(SMALL, num_heads=2)) == degrees("tp", replace(SMALL, vocab_size=18)) == {1, 2}
    sixes = replace(HOSTS, num_devices=12, devices_per_host=6)  # 4 ranks would be of two hosts, some of them
    assert degrees("tp", Transformer(12, 8, 4, 12, 24), sixes) == {1, 2, 3, 6}
    assert degrees("dp", SMALL, batch=6) == {1, 2}
    of_sequence = candidates(replace(SMALL, context_length=6), FOUR, 16)
    assert {plan.tp for plan in of_sequence if plan.sequence_parallel} == {2}
    shallow = candidates(replace(SMALL, num_layers=2), FOUR.with_ranks(2), 4)  # 4 layers with embedding and head
    assert any(plan.schedule == "interleaved" for plan in shallow)


@pytest.mark.parametrize("machine", [FOUR, HOSTS, replace(FOUR, num_devices=2, num_ranks=4)], ids=["4", "16", "4 on 2"])
def test_the_parts_of_every_plan(machine: Machine) -> None:
    for plan, found in all_predictions(machine).items():
        parts = [value for name, value in asdict(found).items() if name.endswith("_s")]
        assert len(parts) == 6
        assert min(parts) >= 0
        assert found.step_s == pytest.approx(math.fsum(parts))
        assert found.compute_s > 0
        has_axis = (plan.tp > 1, plan.pp > 1, plan.dp > 1)
        assert (found.tensor_bytes > 0, found.pipeline_bytes > 0, found.data_bytes > 0) == has_axis
        assert (found.tensor_s > 0, found.pipeline_s > 0, found.data_s > 0) == has_axis
        assert (found.bubble_s > 1e-12) <= (plan.pp > 1)
        assert found.fits == (found.memory_bytes <= machine.rank_memory_bytes)
        assert found.memory_bytes == sum(asdict(found.memory).values())


@pytest.mark.parametrize("machine", [FOUR, HOSTS], ids=["4", "16"])
def test_a_slower_link_makes_no_plan_faster(machine: Machine) -> None:
    slower = [replace(machine, inside=Link(1e-5, 1e9), between=machine.between and Link(1e-4, 1e8))]
    slower.append(replace(machine, inside=Link(1e-6, 2e9)))
    if machine.between:
        slower.append(replace(machine, between=Link(5e-5, 1e9)))
    for other in slower:
        for plan, found in all_predictions(machine).items():
            again = predict(plan, SMALL, 16, other)
            assert again.step_s >= found.step_s * (1 - 1e-12), plan
            assert again.memory == found.memory


def test_faster_devices_make_no_plan_slower() -> None:
    for plan, found in all_predictions(HOSTS).items():
        assert predict(plan, SMALL, 16, replace(HOSTS, flops_s=2e9)).step_s < found.step_s


def test_more_memory_makes_the_best_plan_no_slower() -> None:
    sizes = sorted({found.memory_bytes for found in all_predictions(FOUR).values()})
    times_s = []
    for size in (sizes[0], sizes[len(sizes) // 3], sizes[2 * len(sizes) // 3], sizes[-1]):
        ranked = search(SMALL, replace(FOUR, memory_bytes=size), 16)
        times_s.append(ranked[0].step_s)
        assert min(found.step_s for found in ranked) == times_s[-1]
    assert times_s == sorted(times_s, reverse=True)
    assert times_s[0] > times_s[-1]


def test_the_first_is_the_best_of_those_that_fit() -> None:
    sizes = sorted(found.memory_bytes for found in all_predictions(FOUR).values())
    machine = replace(FOUR, memory_bytes=sizes[len(sizes) // 2])
    ranked = search(SMALL, machine, 16)
    fitting = {plan for plan, found in all_predictions(FOUR).items() if found.memory_bytes <= machine.memory_bytes}
    assert {found.plan for found in ranked} == fitting
    assert all(found.fits for found in ranked)
    keys = [(found.step_s, found.memory_bytes) for found in ranked]
    assert keys == sorted(keys)
    assert len(ranked) < len(all_predictions(FOUR))
    shared = replace(machine, num_devices=2, num_ranks=4, memory_bytes=2 * machine.memory_bytes)  # two on each
    assert {found.plan for found in search(SMALL, shared, 16)} == fitting


def test_nothing_fits() -> None:
    smallest = min(all_predictions(FOUR).values(), key=lambda found: found.memory_bytes)
    with pytest.raises(MplabError) as refused:
        search(SMALL, replace(FOUR, memory_bytes=1e4), 16)
    assert f"the smallest, {smallest.plan}, needs {smallest.memory_bytes / 1e9:.3g} GB" in str(refused.value)
    assert "fits in the 1e-05 GB of a rank" in str(refused.value)


def test_nothing_is_possible() -> None:
    with pytest.raises(MplabError, match="no plan of 7 ranks for a batch of 3"):
        search(SMALL, replace(FOUR, num_devices=7), 3)
    for batch in (0, 2.5, True):
        with pytest.raises(MplabError, match=f"batch={batch}: a step has"):
            search(SMALL, FOUR, batch)  # type: ignore[arg-type]


def test_the_table_says_why() -> None:
    lines = table([*all_predictions(FOUR).values()][:3]).splitlines()
    assert lines[0].split() == [
        *(
            "step",
            "compute",
            "bubble",
            "tensor",
            "pipeline",
            "data",
            "update",
            "tp",
            "sends",
            "pp",
            "sends",
            "dp",
            "sends",
        ),
        *("memory", "plan"),
    ]
    assert [line.index("4 x 1 x 1 ranks") for line in lines[1:]] == [lines[0].index("plan")] * 3
    small = predict(Plan(tp=4), SMALL, 8, replace(FOUR, memory_bytes=1e4))
    assert str(small).endswith("1 x 1 x 4 ranks (dp x pp x tp) (does not fit)")
    assert "8.19 ms" in table([replace(small, tensor_s=0.00819)])
    assert "96.2 kB" in table([replace(small, tensor_bytes=96_200)])


# --- GPT-3 -----------------------------------------------------------------------------------------------------------


@cache
def gpt3_plans() -> list[Prediction]:
    return search(GPT3, CLUSTER, GPT3_BATCH)


def test_gpt3_fits_no_device() -> None:
    """16 bytes for each of 175 billion weights: 2.8 TB; no axis alone makes that 80 GB, nor 8 ranks of two."""
    whole = predict(Plan(512), GPT3, GPT3_BATCH, CLUSTER)
    assert not whole.fits
    assert whole.memory_bytes > 2.7e12
    for plan in (Plan(512, zero=1), Plan(512, zero=2), Plan(64, tp=8), Plan(64, 8), Plan(64, tp=8, zero=1)):
        assert not predict(replace(plan, num_microbatches=1536 // plan.dp), GPT3, GPT3_BATCH, CLUSTER).fits
    with pytest.raises(MplabError, match="no plan fits in the 80 GB of a rank"):
        search(GPT3, MACHINES["8 x H100"], 8)


def test_gpt3_is_laid_out_as_it_was() -> None:
    """Narayanan et al. 2021: tensor inside the host, pipeline among some, data over the rest, many micro-batches."""
    best = gpt3_plans()[0]
    assert 1 < best.plan.tp <= 8
    assert best.plan.pp > 1
    assert best.plan.dp > 1
    assert best.plan.schedule in ("interleaved", "zero_bubble")
    assert best.plan.num_microbatches >= 4 * best.plan.pp
    theirs = [found for found in gpt3_plans() if found.plan.tp == 8 and found.plan.pp in (8, 16)]
    assert theirs[0].step_s < 1.15 * best.step_s
    tokens = GPT3_BATCH * GPT3.context_length
    reached = 6 * GPT3.num_parameters * tokens / best.step_s / 512
    assert 0.35 < reached / 989e12 < 0.55  # of the peak, end to end


def test_gpt3s_tensor_axis_across_hosts_is_slow() -> None:
    plans = [Plan(512 // 8 // tp, 8, tp, num_microbatches=1536 // (512 // 8 // tp) // 2) for tp in (8, 16)]
    inside, across = (predict(plan, GPT3, GPT3_BATCH, CLUSTER) for plan in plans)
    assert across.tensor_s > 5 * inside.tensor_s
    assert across.step_s > 1.5 * inside.step_s
