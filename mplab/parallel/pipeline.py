"""Layer-wise parallelism: every rank holds some consecutive layers, and micro-batches go through the ranks.

    rank 0: layers 0, 1        rank 1: layers 2, 3        rank 2: layers 4, 5, loss
        F0 -- activation -->       F0 -- activation -->       F0
        B0 <--- gradient ---       B0 <--- gradient ---       B0

The order is the schedule's and nothing else's: `Interpreter` walks this rank's actions, whichever schedule it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import Stage, cross_entropy, layers, tied_names
from mplab.parallel.agree import check_agreement, exchange
from mplab.parallel.backward import SplitBackward
from mplab.parallel.dropout import dropped_share
from mplab.parallel.interpreter import Interpreter, program
from mplab.parallel.layer_state import put_states, receive_state, send_state, take_state
from mplab.parallel.serial import LossFunction, check_batch
from mplab.parallel.shares import check_same_rank, described
from mplab.parallel.tied import TiedWeights
from mplab.plan.partition import check_cuts, stage_bounds
from mplab.plan.schedule import Order, Schedule, build

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""Parameters -> their optimizer: a class such as `torch.optim.AdamW`, or `partial(torch.optim.SGD, lr=0.1)`."""


class PipelineParallel:
    """Trains a model that is cut between its layers, as `Serial` would train all of it.

    Args:
        model: what `mplab.models.layers` can turn into a chain. Each rank copies its own layers, and the model itself
            is never changed. Tied weights that end up on several ranks start as the first of them has them.
        cuts: the first layer of every stage but the first, in order: (2, 4) cuts after layer 1 and after layer 3.
        comm: this rank's communicator.
        schedule: "naive", "gpipe", "1f1b", "interleaved" (two stages a rank), "zero_bubble", an order of your own, or a
            `Schedule`, which then says the number of micro-batches.
        num_microbatches: parts of a batch.
        loss_fn: outputs and targets -> mean loss over the samples.
        optimizer: makes the optimizer of this rank's parameters.
        recompute: keep only the input of a stage, and compute its activations again for the backward.

    Raises:
        MplabError: a model that is no chain, cuts or a schedule that do not fit it or the world, layers that can't be
            computed once more, or ranks that were given different settings; before any training.

    **Communication**: at the start, the settings (all_gather) and tied weights (broadcast).

    Reference:
        Huang et al., "GPipe: Efficient training of giant neural networks using pipeline parallelism", NeurIPS 2019,
        sections 2.2 and 2.3.
    """

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[int],
        comm: Communicator,
        schedule: str | Order | Schedule = "1f1b",
        num_microbatches: int = 8,
        loss_fn: LossFunction = cross_entropy,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        recompute: bool = False,
    ) -> None:
        if not isinstance(schedule, Schedule):
            schedule = build(schedule, comm.size, num_microbatches)
        if schedule.num_ranks != comm.size:
            raise MplabError(
                f"schedule {schedule.name} is for {schedule.num_ranks} ranks, and this group has {comm.size}: "
                f"build it for {comm.size}"
            )
        if not callable(loss_fn):
            raise MplabError(f"loss_fn is a {type(loss_fn).__name__}: give a function of outputs and targets")
        if not callable(optimizer):
            raise MplabError(
                f"optimizer is a {type(optimizer).__name__}: each rank makes one for its own layers, so give what "
                "makes it: torch.optim.AdamW, or partial(torch.optim.SGD, lr=0.1)"
            )
        self.schedule, self.comm, self.loss_fn, self.recompute = schedule, comm, loss_fn, recompute
        self._model, self._layers, self._make_optimizer = model, layers(model), optimizer
        self._keys = [layer.state_keys() for layer in self._layers]
        self.cuts = self._check_cuts(cuts)
        if recompute:
            refuse_recomputation(model)
        check_agreement(
            comm,
            {
                "cuts": self.cuts,
                "schedule": [" ".join(map(str, actions)) for actions in schedule.ranks],
                "recompute": recompute,
                "parameters": described(model),
            },
        )
        self._program = program(schedule, comm.rank)
        self._place()
        self._tied.broadcast()

    # -- where the layers are ------------------------------------------------------------------------------------------

    def _check_cuts(self, cuts: Sequence[int]) -> tuple[int, ...]:
        return check_cuts(cuts, [layer.name for layer in self._layers], self.schedule.num_stages)

    def _ranks(self) -> list[int]:
        """The rank of every layer."""
        bounds = stage_bounds(self.cuts, len(self._layers))
        return [self.schedule.rank_of[s] for s, (start, end) in enumerate(bounds) for _ in range(start, end)]

    def _place(self) -> None:
        """Copy this rank's layers out of the model, and make their optimizer."""
        bounds = stage_bounds(self.cuts, len(self._layers))
        self.stages = {
            s: Stage(self._layers[slice(*bounds[s])], self.comm.device) for s in self.schedule.stages(self.comm.rank)
        }
        in_two_parts = {action.stage for action in self.schedule.actions if action.kind == "I"}
        self._splits = {s: SplitBackward(stage) for s, stage in self.stages.items() if s in in_two_parts}
        parameters = [p for stage in self.stages.values() for p in stage.parameters()]
        self.optimizer = self._make_optimizer(parameters) if parameters else None
        self._tie()

    def _tie(self) -> None:
        rank_of = {key: rank for keys, rank in zip(self._keys, self._ranks(), strict=True) for key in keys}
        self._tied = TiedWeights(tied_names(self._layers), rank_of, self.stages.values(), self.comm)

    def connect(self, comm: Communicator) -> None:
        """Go on in another run of the world, with this rank's communicator there.

        Raises:
            MplabError: it is another rank's.
        """
        check_same_rank(comm, self.comm)
        self.comm = comm
        self._tie()

    def move(self, cuts: Sequence[int]) -> None:
        """Cut elsewhere, between two steps: layers go to their new ranks with the state of their optimizer.

        Stages and optimizer are new objects then. The optimizer's options, such as a learning rate that was changed,
        are kept; a rank that had no parameters takes those of the first rank that had. What was set on the old stages
        by hand, such as `eval()`, is as in the model again.

        Args:
            cuts: as at the start; the same on every rank.

        Raises:
            MplabError: cuts that don't fit the model, or that differ between ranks; nothing has moved then.

        **Communication**: the cuts (all_gather); for each layer that changes its rank a message of names, and all of
        its state, in one message a tensor; where a rank gets its first parameters, the options (all_gather).
        """
        cuts = self._check_cuts(cuts)
        check_agreement(self.comm, {"cuts": cuts})
        if cuts == self.cuts:
            return
        me, before, of_stages = self.comm.rank, self._ranks(), list(self.stages.values())
        states = {
            i: take_state([*self._keys[i], *dict(self._layers[i].named_buffers())], of_stages, self.optimizer)
            for i, rank in enumerate(before)
            if rank == me
        }
        self.cuts = cuts
        for i, (src, dst) in enumerate(zip(before, self._ranks(), strict=True)):
            if src != dst and me == src:
                send_state(self.comm, states.pop(i), dst)
            elif src != dst and me == dst:
                states[i] = receive_state(self.comm, src)
        options = self._options(before)
        self._place()
        put_states(states.values(), self.stages.values(), self.optimizer)
        if self.optimizer is not None:
            for group, of_group in zip(self.optimizer.param_groups, options, strict=False):
                group |= of_group

    def _options(self, before: Sequence[int]) -> list[dict[str, Any]]:
        """Those of this rank's optimizer, a group after the other, or of the first rank's that had one before a move.

        Args:
            before: the rank that every layer had.
        """
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        had, has = (
            {rank for layer, rank in zip(self._layers, ranks, strict=True) if any(layer.named_parameters())}
            for ranks in (before, self._ranks())
        )
        if has <= had:
            return options
        said = [
            {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in options
        ]
        of_ranks = exchange(said, self.comm)
        return options or next(filter(None, of_ranks))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's ordinary `state_dict`, on every rank.

        **Communication**: every tensor, from the rank that holds it (broadcast).
        """
        mine: dict[str, Tensor] = {}
        for stage in self.stages.values():
            mine |= stage.state_dict()
        merged = {
            key: self.comm.broadcast(mine[key] if rank == self.comm.rank else None, rank)
            for keys, rank in zip(self._keys, self._ranks(), strict=True)
            for key in keys
        }
        return {key: merged[key] for key in self._model.state_dict()}

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> float:
        """One update; afterwards the gradients of this rank's stages can still be read.

        Args:
            batch: all of it on every rank, on any device; the first stage takes its inputs, the last its targets. Parts
                may differ by one sample: the loss weighs samples, not micro-batches.

        Returns:
            The mean loss over the batch's samples, before the update; the same on every rank.

        Raises:
            MplabError: inputs and targets of different lengths, or fewer samples than micro-batches.

        **Communication**: for every micro-batch and each cut between two ranks an activation to the next and its
        gradient back, an empty message where it has none; the gradients of tied weights (all_reduce among the ranks
        that hold them); the loss (broadcast).
        """
        inputs, targets = batch
        num_parts = self.schedule.num_microbatches
        num_samples = check_batch(batch, num_parts)
        device, last = self.comm.device, self.schedule.num_stages - 1
        interpreter = Interpreter(
            self.schedule,
            self.comm,
            self.stages,
            self._splits,
            self.loss_fn,
            self.recompute,
            inputs.to(device).tensor_split(num_parts) if 0 in self.stages else (),
            targets.to(device).tensor_split(num_parts) if last in self.stages else (),
            [len(part) / num_samples for part in targets.tensor_split(num_parts)],
        )
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        interpreter.run(self._program)
        self._tied.reduce_gradients()
        if self.optimizer is not None:
            with self.comm.trace.span("update"):
                self.optimizer.step()
        losses = interpreter.losses
        return float(self.comm.broadcast(torch.stack(losses).sum() if losses else None, self.schedule.rank_of[last]))


_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d


def refuse_recomputation(model: nn.Module) -> None:
    """Of what does something else, or once more, when it is computed again.

    A forward that itself calls `functional.dropout`, or draws otherwise, can't be seen: its gradients are then those of
    another draw than the loss.

    Raises:
        MplabError: a module of the model is one of these.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        if (p := dropped_share(module)) > 0:
            raise MplabError(
                f"recompute=True, but {name} drops activations at random (p = {p}), and would drop others the second "
                "time: set its p to 0, or recompute=False"
            )
        if isinstance(module, nn.RReLU) and module.lower < module.upper:
            raise MplabError(
                f"recompute=True, but {name} draws its slopes at random (from {module.lower} to {module.upper}), and "
                "would draw others the second time: set its upper to its lower, or recompute=False"
            )
        if isinstance(module, _NORMS) and module.track_running_stats:
            raise MplabError(
                f"recompute=True, but {name} keeps running means of its inputs, and would count each micro-batch "
                "twice: set its track_running_stats to False, or recompute=False"
            )
