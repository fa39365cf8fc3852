"""Which plan: all layouts of a GPT on a machine, the fastest first, by what a step of each should take.

Reference:
    Zheng et al., "Alpa: Automating inter- and intra-operator parallelism for distributed deep learning", OSDI 2022 (a
    search over plans by a cost model).
"""

from __future__ import annotations

from collections.abc import Iterator

from mplab.errors import MplabError
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.predict import Prediction as Prediction
from mplab.plan.predict import predict as predict
from mplab.plan.predict import table as table
from mplab.plan.schedule import ORDERS
from mplab.plan.share import memory_of
from mplab.plan.transformer import Transformer


def search(model: Transformer, machine: Machine, batch: int) -> list[Prediction]:
    """All plans that fit the memory, the fastest first; of equally fast ones the one that holds less.

    Args:
        model: what is trained.
        machine: on what.
        batch: samples of a step, of all replicas together.

    Raises:
        MplabError: no plan is possible, or none fits; says what the smallest needs.
    """
    least: tuple[int, Plan] | None = None
    found = []
    for plan in candidates(model, machine, batch):
        memory = memory_of(plan, model, batch)
        if memory.total_bytes <= machine.rank_memory_bytes:
            found.append(predict(plan, model, batch, machine))
        elif least is None or memory.total_bytes < least[0]:
            least = memory.total_bytes, plan
    if not found and least is None:
        raise MplabError(
            f"no plan of {machine.ranks} ranks for a batch of {batch}, {model.num_heads} heads and {model.num_layers} "
            "blocks: dp must divide the batch, tp the heads and the vocabulary, and pp is at most the number of layers"
        )
    if not found:
        assert least is not None
        raise MplabError(
            f"no plan fits in the {machine.rank_memory_bytes / 1e9:.3g} GB of a rank: the smallest, {least[1]}, needs "
            f"{least[0] / 1e9:.3g} GB; take more devices, a smaller batch or a smaller model"
        )
    return sorted(found, key=lambda prediction: (prediction.step_s, prediction.memory_bytes))


def candidates(model: Transformer, machine: Machine, batch: int) -> Iterator[Plan]:
    """All plans for the machine's ranks in which everything divides, the simplest first.

    The tensor axis stays inside a host. Left out is what takes no less time and no less memory than another plan:
    sharding among one replica, recomputing where one micro-batch is in flight, "interleaved" where pp does not divide
    the micro-batches, "naive" and "gpipe" with one micro-batch, which are "1f1b".

    Args:
        model: what is trained.
        machine: on what.
        batch: samples of a step.
    """
    if not (type(batch) is int and batch >= 1):
        raise MplabError(f"batch={batch!r}: a step has a whole number of samples, 1 or more")
    for tp in divisors(machine.ranks):
        if model.num_heads % tp or model.vocab_size % tp or (tp > 1 and machine.ranks_per_host % tp):
            continue
        for pp in divisors(machine.ranks // tp):
            dp = machine.ranks // tp // pp
            if pp > model.num_layers + 2 or batch % dp:
                continue
            zeros = (0,) if dp == 1 else (0, 1) if pp > 1 else (0, 1, 2, 3)
            for num_microbatches in divisors(batch // dp):
                for schedule in ORDERS if pp > 1 else ("1f1b",):
                    if schedule == "interleaved" and (num_microbatches % pp or 2 * pp > model.num_layers + 2):
                        continue
                    if num_microbatches == 1 and schedule in ("naive", "gpipe"):
                        continue
                    can_recompute = pp > 1 and num_microbatches > 1 and schedule != "naive"
                    for zero in zeros:
                        for sequence_parallel in (
                            (False, True) if tp > 1 and not model.context_length % tp else (False,)
                        ):
                            for recompute in (False, True) if can_recompute else (False,):
                                yield Plan(
                                    dp,
                                    pp,
                                    tp,
                                    schedule=schedule,
                                    num_microbatches=num_microbatches,
                                    zero=zero,
                                    sequence_parallel=sequence_parallel,
                                    recompute=recompute,
                                )


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]
