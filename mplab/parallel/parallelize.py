"""The one call that a user needs: a model, a world, a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mplab.datasets import Batch
from mplab.models import cross_entropy
from mplab.parallel import checkpoint
from mplab.parallel.check_plan import check_plan
from mplab.parallel.hybrid import HybridParallel
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.parallel.shares import check_training
from mplab.plan.layout import Plan
from mplab.world import Rank, World
from mplab.world.launch import ProcessWorld

T = TypeVar("T")


def parallelize(
    model: nn.Module,
    world: World | ProcessWorld,
    plan: Plan,
    loss_fn: LossFunction = cross_entropy,
    optimizer: OptimizerFactory = torch.optim.AdamW,
    max_norm: float | None = None,
    tensor_plan: Mapping[str, str] | None = None,
) -> Parallelized:
    """Lay a model out over the ranks of a world.

        trained = parallelize(GPT(config), World(4), Plan(dp=2, tp=2))
        losses = [trained.step(batch) for batch in data.batches(20)]

    Args:
        model: it is not changed.
        world: its ranks; `plan.num_ranks` of them.
        plan: how; data, pipeline and tensor parallelism, ZeRO, and every mixture of them.
        loss_fn: outputs and targets -> mean loss over the samples.
        optimizer: makes the optimizer of each rank's parameters.
        max_norm: longest gradient (2-norm over all parameters); a longer one is scaled down to it. None: any.
        tensor_plan: which layers are cut over the tensor axis, and how; None: the model's own.

    Raises:
        MplabError: what the plan can't do with this model and this world, all of it at once, before a rank starts.
    """
    check_training(model, loss_fn, optimizer, plan.num_microbatches, max_norm, None)
    check_plan(model, world.size, plan, loss_fn, tensor_plan)
    return Parallelized(
        world,
        lambda rank: HybridParallel(model, rank.comm, plan, loss_fn, optimizer, max_norm, tensor_plan),
        plan,
    )


class Parallelized:
    """A model on the ranks of a world, called from outside of them.

    Args:
        world: its ranks.
        make: makes what trains on a rank.
        plan: how the model is laid out.
    """

    def __init__(self, world: World | ProcessWorld, make: Callable[[Rank], HybridParallel], plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.engines: dict[int, HybridParallel] = {}  # of the ranks of this process

        def start(rank: Rank) -> None:
            self.engines[rank.index] = make(rank)

        world.run(start)

    def step(self, batch: Batch) -> float:
        """One update on every rank: a run of the world, whose timeline and ledgers are this step's.

        Args:
            batch: all of it; each replica takes its shard. Of several processes each gives the same.

        Returns:
            The mean loss over the batch's samples, before the update.

        Raises:
            MplabError: what `HybridParallel.step` refuses.
        """
        return self.steps([batch])[0]

    def steps(self, batches: Iterable[Batch]) -> list[float]:
        """Several updates in one run of the world.

        Args:
            batches: one for each.

        Returns:
            Their losses.
        """
        given = list(batches)  # ranks are threads: from an iterator each would take what the others then lack
        return self._run(lambda engine: [engine.step(batch) for batch in given])

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's ordinary `state_dict`; the optimizer's state is not in it."""
        return self._run(lambda engine: engine.full_state_dict())

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a whole model's `state_dict`, saved under any plan; the optimizer's state stays."""
        self._run(lambda engine: engine.load_full_state_dict(state))

    def save(self, root: str | Path, position: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint to `root/step-...`, as `mplab.parallel.checkpoint.save` does.

        Args:
            root: the folder of all checkpoints.
            position: where the data is, and whatever else must be known to go on; what JSON can write.

        Returns:
            The checkpoint's folder.
        """
        return self._run(lambda engine: checkpoint.save(engine, root, position))

    def load(self, root: str | Path) -> dict[str, Any]:
        """Go on where the newest checkpoint in `root` was saved, under whatever plan; returns the position."""
        return self._run(lambda engine: checkpoint.load(engine, root))

    @property
    def num_steps(self) -> int:
        """Updates so far, those before a checkpoint included."""
        return next(iter(self.engines.values())).num_steps

    def _run(self, call: Callable[[HybridParallel], T]) -> T:
        """What all ranks get from their engines, which is the same."""

        def run(rank: Rank) -> T:
            engine = self.engines[rank.index]
            engine.connect(rank.comm)
            return call(engine)

        return self.world.run(run)[0]
