"""The planner's prediction beside the measured step of every plan of 2 and of 4 thread ranks, for two models.

The models are GPTs (fp32, four blocks, a head that is not tied) of width 128 "0.9 M" and 256 "3 M", which train on 4
samples of 64 tokens by AdamW, with one torch thread a rank. Plans are all that `mplab.plan.search` finds.
The machine is what `probe()` measures, with the four speeds that `calibrated` finds in seven plans of one and of two
ranks (`CALIBRATION`), measured first; no plan with stages, with more than two ranks or with ZeRO 2 or 3 is among them.
All plans of a case run in every round, laid out anew, one after another, every other round backwards; a step lasts from
when the last rank finished the step before to when the last rank finished this one, and the median of a round's steps
counts. Rounds are few, since plans are many, so the plan that is predicted as the first, and those that were measured
as the fastest, run once more in rounds of their own: the best measured is the best of these.
Rows "first" are the plan predicted as the first beside the best measured (1: it is the same), with Spearman's
correlation of predicted and measured times over all plans; "first, other model" are those with a machine whose speeds
come from the other model's steps. Then each plan beside its prediction, the fastest predicted first: a ratio above 1 is
slower than predicted. It can't show how well other machines are predicted: here ranks are threads that share the cores
and one Python.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mplab.bench.common import Row, compare
from mplab.bench.torch_data import Size, batch, gpt
from mplab.parallel.measure_plans import measure_plans, rank_correlation
from mplab.plan.machines import Machine
from mplab.plan.search import search
from mplab.plan.transformer import Transformer
from mplab.world.described import CALIBRATION, calibrated, described
from mplab.world.probe import probe

SIZES = {"0.9 M": Size(128, 64, 4), "3 M": Size(256, 64, 4)}
NUM_RANKS = (2, 4)
NUM_ROUNDS, NUM_STEPS = 3, 2
NUM_FINALISTS, NUM_FINAL_ROUNDS, NUM_FINAL_STEPS = 8, 10, 3


def run(
    sizes: Mapping[str, Size] = SIZES,
    num_ranks: Sequence[int] = NUM_RANKS,
    num_rounds: int = NUM_ROUNDS,
    num_final_rounds: int = NUM_FINAL_ROUNDS,
) -> list[Row]:
    """Every model with every number of ranks.

    Args:
        sizes: of the models and batches, by name.
        num_ranks: of the worlds.
        num_rounds: rounds of all plans of a case.
        num_final_rounds: rounds of its fastest ones.
    """
    here = described(probe())
    machines = {name: _calibrated(here, size, num_final_rounds) for name, size in sizes.items()}
    firsts, all_plans = list[Row](), list[Row]()
    for name, size in sizes.items():
        others = [machine for other, machine in machines.items() if other != name]
        for n in num_ranks:
            of_case = _rows(f"{name}, {n} ranks", size, n, [machines[name], *others], num_rounds, num_final_rounds)
            firsts += of_case[: 1 + len(others)]
            all_plans += of_case[1 + len(others) :]
    return firsts + all_plans


def transformer(size: Size) -> Transformer:
    """The model as the planner knows it."""
    config: Any = gpt(size).config
    return Transformer(
        config.vocab_size, config.context_length, config.num_layers, config.num_heads, config.width, config.tied
    )


def _calibrated(here: Machine, size: Size, num_rounds: int) -> Machine:
    seconds = measure_plans(gpt(size), CALIBRATION, batch(size), num_rounds, NUM_FINAL_STEPS)
    medians = {plan: statistics.median(times) for plan, times in seconds.items()}
    return calibrated(here, transformer(size), size.batch_size, medians)


def _rows(
    case: str, size: Size, n: int, machines: Sequence[Machine], num_rounds: int, num_final_rounds: int
) -> list[Row]:
    """The first plan by each machine, then all plans by the first machine."""
    model, data, sizes = gpt(size), batch(size), transformer(size)
    by_machine = [search(sizes, machine.with_ranks(n), size.batch_size) for machine in machines]
    plans = [found.plan for found in by_machine[0]]
    seconds = measure_plans(model, plans, data, num_rounds, NUM_STEPS)
    measured_s = {plan: statistics.median(times) for plan, times in seconds.items()}
    fastest = sorted(plans, key=measured_s.__getitem__)[:NUM_FINALISTS]
    finalists = list(dict.fromkeys([ranked[0].plan for ranked in by_machine] + fastest))
    final = measure_plans(model, finalists, data, num_final_rounds, NUM_FINAL_STEPS)
    best = min(finalists, key=lambda plan: statistics.median(final[plan]))
    rows = []
    for ranked, whose in zip(by_machine, ["first", *["first, other model"] * len(machines)], strict=False):
        first = ranked[0].plan
        rho = rank_correlation([found.step_s for found in ranked], [measured_s[found.plan] for found in ranked])
        figures: dict[str, float | str] = {"plans": len(plans), "spearman": rho, "plan": f"{first}", "best": f"{best}"}
        rows.append(compare(f"{case}: {whose}", "best measured", final[first], final[best], **figures))
    for found in by_machine[0]:
        times = seconds[found.plan]
        rows.append(compare(case, "prediction", times, [found.step_s] * len(times), plan=f"{found.plan}"))
    return rows
