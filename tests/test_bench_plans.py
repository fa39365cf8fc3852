"""The benchmark of the planner: which plans are held against which, by known times. No time is judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab.bench import plans as bench
from mplab.bench.common import Row
from mplab.bench.plans import SIZES, transformer
from mplab.bench.torch_data import Size, batch, gpt
from mplab.models import GPT, GPTConfig
from mplab.parallel.measure_plans import rank_correlation
from mplab.plan.cost import Link
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.search import candidates, predict, search
from mplab.plan.transformer import Transformer
from mplab.world.described import CALIBRATION

HERE = Machine("here", 2, 7e10, 8e9, 2e10, Link(4e-5, 1e10), one_process=True)
SPEEDS = {"launch_s": 5e-4, "call_s": 2e-4, "update_launch_s": 6e-5}
TINY = {"tiny": Size(16, 8, 4), "small": Size(32, 8, 4)}


class Known:
    """No ranks and no clocks: a plan takes what it should on a machine of known speeds, in each round a bit longer.

    Args:
        slower: seconds that plans take besides, but where speeds are calibrated.
        machines: by the models' width, where they differ.
        lucky: takes nearly no time in its first round.
        tired: takes a second more where it runs once more.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        slower: dict[Plan, float] | None = None,
        machines: dict[int, Machine] | None = None,
        lucky: Plan | None = None,
        tired: Plan | None = None,
    ) -> None:
        self.slower, self.calls = slower or {}, list[tuple[int, list[Plan], int, int]]()
        self.machines = machines or dict.fromkeys((size.width for size in TINY.values()), replace(HERE, **SPEEDS))
        self.lucky, self.tired = lucky, tired
        monkeypatch.setattr(bench, "measure_plans", self.measure)
        monkeypatch.setattr(bench, "probe", lambda: None)
        monkeypatch.setattr(bench, "described", lambda probed: HERE)

    def measure(
        self, model: Any, plans: Iterable[Plan], data: Any, num_rounds: int, num_steps: int
    ) -> dict[Plan, list[float]]:
        plans, sizes = list(plans), transformer(Size(model.config.width, model.config.context_length, len(data[0])))
        assert torch.equal(data[0], batch(Size(model.config.width, model.config.context_length, 4))[0])
        self.calls.append((model.config.width, plans, num_rounds, num_steps))
        rounds = [1 + (r - num_rounds // 2) / 100 for r in range(num_rounds)]
        seconds = {plan: [self.step_s(plan, sizes) * times for times in rounds] for plan in plans}
        if self.lucky in seconds and len(self.calls) > len(TINY):
            seconds[self.lucky][0] = 1e-9
        if self.tired in seconds and num_steps == bench.NUM_FINAL_STEPS and len(self.calls) > len(TINY):
            seconds[self.tired] = [1 + times for times in seconds[self.tired]]
        return seconds

    def step_s(self, plan: Plan, sizes: Any) -> float:
        found = predict(plan, sizes, 4, self.machines[sizes.width].with_ranks(plan.num_ranks))
        return found.step_s + (self.slower.get(plan, 0.0) if len(self.calls) > len(TINY) else 0.0)

    def run(self, num_ranks: tuple[int, ...] = (2,)) -> list[Row]:
        return bench.run(TINY, num_ranks, 3, 5)


def ranked(name: str, num_ranks: int) -> list[Plan]:
    machine = replace(HERE, **SPEEDS).with_ranks(num_ranks)
    return [found.plan for found in search(transformer(TINY[name]), machine, 4)]


def test_what_was_predicted_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(monkeypatch)
    rows = known.run((2, 4))
    cases = [f"{name}, {n} ranks" for name in TINY for n in (2, 4)]
    firsts, others = rows[:8], rows[8:]
    assert [row.case for row in firsts] == [f"{c}: {who}" for c in cases for who in ("first", "first, other model")]
    for row in firsts:
        assert row.peer == "best measured"
        assert row.extra["spearman"] == pytest.approx(1, abs=2e-3)  # of equal plans one may be 1e-16 later
        assert row.ratio == pytest.approx(1)
        assert row.runs == 5
    place = 0
    for name in TINY:
        for n in (2, 4):
            plans = ranked(name, n)
            of_case = others[place : place + len(plans)]
            place += len(plans)
            assert {row.case for row in of_case} == {f"{name}, {n} ranks"}
            assert sorted(str(row.extra["plan"]) for row in of_case) == sorted(map(str, plans))
            predicted = [float(row.extra["peer_s"]) for row in of_case]
            assert predicted == sorted(predicted)
            for row in of_case:
                assert (row.peer, row.runs) == ("prediction", 3)
                assert row.ratio == pytest.approx(1, rel=1e-5)
                assert row.low == pytest.approx(0.992, rel=1e-5)
    assert place == len(others)


def test_what_is_measured_and_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models' speeds first; then all plans of a case, and the fastest once more."""
    known = Known(monkeypatch)
    known.run()
    calibrations, cases = known.calls[:2], known.calls[2:]
    for call, size in zip(calibrations, TINY.values(), strict=True):
        assert call == (size.width, [*CALIBRATION], 5, bench.NUM_FINAL_STEPS)
    assert len(cases) == 4
    for (name, size), of_all, of_few in zip(TINY.items(), cases[::2], cases[1::2], strict=True):
        assert of_all[0] == of_few[0] == size.width
        assert set(of_all[1]) == set(candidates(transformer(size), HERE.with_ranks(2), 4))
        assert of_all[2:] == (3, bench.NUM_STEPS)
        assert of_few[2:] == (5, bench.NUM_FINAL_STEPS)
        assert len(of_few[1]) == bench.NUM_FINALISTS
        times = {plan: known.step_s(plan, transformer(size)) for plan in ranked(name, 2)}
        slowest = max(times[plan] for plan in of_few[1])
        assert sum(seconds < slowest - 1e-9 for seconds in times.values()) < bench.NUM_FINALISTS


def test_a_first_plan_that_is_slow_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no finalist by its time, and is held against the best of them all the same."""
    first, second = ranked("tiny", 2)[:2]
    known = Known(monkeypatch, {first: 1.0})
    row = {row.case: row for row in known.run()}["tiny, 2 ranks: first"]
    assert row.extra["plan"] == str(first)
    assert row.extra["best"] != str(first)
    assert row.extra["peer_s"] == pytest.approx(known.step_s(second, transformer(TINY["tiny"])), rel=1e-5)
    assert row.ratio is not None
    assert row.ratio > 10
    assert float(row.extra["spearman"]) < 0.99


def test_each_model_is_also_predicted_with_the_speeds_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine has dear collectives, the other slow devices. And a median is no best case."""
    tiny, small = (transformer(size) for size in TINY.values())
    machines = {
        tiny.width: replace(HERE, **SPEEDS | {"call_s": 3e-3}),
        small.width: replace(HERE, **SPEEDS | {"flops_s": 1e7}),
    }
    own, other = (search(tiny, machines[width].with_ranks(2), 4) for width in (tiny.width, small.width))
    last, tired = own[-1].plan, own[0].plan
    known = Known(monkeypatch, {other[0].plan: 1.0}, machines, lucky=last, tired=tired)
    rows = known.run()
    seconds = {found.plan: known.step_s(found.plan, tiny) for found in own}
    for case, ranked, first_s in (
        ("first", own, 1 + seconds[tired]),  # it was the fastest, but not once more
        ("first, other model", other, seconds[other[0].plan]),
    ):
        (row,) = [row for row in rows if row.case == f"tiny, 2 ranks: {case}"]
        rho = rank_correlation([found.step_s for found in ranked], [seconds[found.plan] for found in ranked])
        assert row.extra["spearman"] == pytest.approx(rho)
        assert (row.extra["plan"], row.extra["plans"]) == (str(ranked[0].plan), len(own))
        assert row.extra["best"] not in (str(tired), str(last), str(other[0].plan))
        assert row.ratio == pytest.approx(first_s / float(row.extra["peer_s"]))
        assert rho < 0.99
    predicted = {str(row.extra["plan"]): row.extra["peer_s"] for row in rows if row.case == "tiny, 2 ranks"}
    assert predicted == pytest.approx({str(found.plan): found.step_s for found in own})


def test_the_model_is_known_to_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in SIZES.values():
        model = gpt(size)
        assert asdict(model.config).items() <= asdict(transformer(size)).items()
        assert transformer(size).num_parameters == sum(p.numel() for p in model.parameters())
        for plan in CALIBRATION:
            assert size.batch_size % (plan.dp * plan.num_microbatches) == 0
    other = GPT(GPTConfig(12, 8, 2, 4, 16, tied=False))  # no two settings are equal
    monkeypatch.setattr(bench, "gpt", lambda size: other)
    assert transformer(Size(16, 8, 4)) == Transformer(12, 8, 2, 4, 16, tied=False)


def test_names_are_numbers_of_parameters() -> None:
    millions = [transformer(size).num_parameters / 1e6 for size in SIZES.values()]
    assert [f"{n:.0f} M" if n > 1 else f"{n:.1f} M" for n in millions] == [*SIZES]
