"""Every strategy at once: tensor inside stage inside replica, as a `Plan` says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.comm.mesh import Mesh
from mplab.datasets import Batch, shard
from mplab.errors import MplabError
from mplab.models import Stage, cross_entropy, layers, tied_names
from mplab.parallel.agree import check_agreement, check_same_batch
from mplab.parallel.backward import SplitBackward
from mplab.parallel.check_plan import check_plan, plan_schedule, stage_cuts
from mplab.parallel.check_state import check_state
from mplab.parallel.cut import Cut, cuts_by_name, cuts_of
from mplab.parallel.interpreter import Interpreter, program
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.replicas import Replicas
from mplab.parallel.serial import LossFunction, check_batch
from mplab.parallel.sharded_replicas import ShardedReplicas
from mplab.parallel.shares import broadcast_state, check_same_rank, check_training, described, squared_norm
from mplab.parallel.tensor import has_cut_logits, parallel_loss
from mplab.parallel.tensor_model import connect, tensor_parallel
from mplab.parallel.tensor_plan import tensor_plan as known_plan
from mplab.parallel.tensor_state import (
    check_whole_gradients,
    full_gradients,
    full_state_dict,
    load_full_state_dict,
    partial_parameters,
    sum_gradients,
)
from mplab.parallel.tied import TiedWeights
from mplab.parallel.whole_state import Slice
from mplab.plan.layout import Plan
from mplab.plan.partition import stage_bounds


class HybridParallel:
    """Trains a model as a plan lays it out, as `Serial` would train it on one device.

    Args:
        model: any module with `pp=1` and `zero` up to 1, else what `mplab.models.layers` can turn into a chain; it is
            never changed. The values of the first replica count.
        comm: this rank's communicator, of `plan.num_ranks` ranks.
        plan: how.
        loss_fn: outputs and targets -> mean loss over the samples; of logits that stay cut over the tensor axis
            `cross_entropy`.
        optimizer: makes the optimizer of this rank's parameters: it must treat every element alike, as SGD and Adam do,
            where one is cut (`tp`, `zero`).
        max_norm: longest gradient (2-norm over all parameters of the model, each counted once); a longer one is scaled
            down to it. None: any.
        tensor_plan: which layers are cut over the tensor axis, and how; None: the model's own.

    Raises:
        MplabError: what this plan can't do with this model and these ranks, all of it at once, before anything starts.

    **Communication**: at the start the settings (all_gather), and the weights, along each axis.

    Reference:
        Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
        section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        plan: Plan,
        loss_fn: LossFunction = cross_entropy,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        max_norm: float | None = None,
        tensor_plan: Mapping[str, str] | None = None,
    ) -> None:
        check_training(model, loss_fn, optimizer, plan.num_microbatches, max_norm, None)
        check_plan(model, comm.size, plan, loss_fn, tensor_plan)
        check_agreement(
            comm,
            {
                "plan": plan.to_json(),
                "max_norm": max_norm,
                "tensor_plan": None if tensor_plan is None else dict(tensor_plan),
                "parameters": described(model),
            },
        )
        self.plan, self.loss_fn, self.max_norm, self.num_steps = plan, loss_fn, max_norm, 0
        first_names = {p: name for name, p in model.named_parameters()}
        self._shapes = {key: value.shape for key, value in model.state_dict().items()}
        self.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.names = set(self._shapes)
        self.tied = {name: first_names[p] for name, p in model.named_parameters(remove_duplicate=False)}
        self.comm, self.axes = comm, Mesh(plan.dp, plan.pp, plan.tp).connect(comm)
        self.schedule = plan_schedule(plan)

        self._has_cut_logits = plan.tp > 1 and has_cut_logits(
            model, known_plan(model) if tensor_plan is None else tensor_plan, loss_fn
        )

        # Tensor inside stage inside replica: layers are cut, then shared out, and each rank's share is replicated.
        cut = model
        if plan.tp > 1:
            cut = tensor_parallel(model, self.axes.tp, tensor_plan, plan.sequence_parallel)
        self._sharded: ShardedReplicas | None = None
        if plan.zero > 1:
            self._sharded = ShardedReplicas(
                cut, self.axes, plan.zero, self._loss, optimizer, plan.num_microbatches, max_norm
            )
            return
        self.stages, self._rank_of = self._make_stages(cut)
        self._splits = {
            s: SplitBackward(stage)
            for s, stage in self.stages.items()
            if any(action.kind == "I" and action.stage == s for action in self.schedule.actions)
        }
        self._tie()
        self._tied.broadcast()
        named: dict[str, nn.Parameter] = {}
        for stage in self.stages.values():
            broadcast_state(stage, self.axes.dp)
            named |= dict(stage.named_parameters())
        self.replicas = Replicas(named, self.axes.dp, plan.zero == 1, optimizer)
        self._program = program(self.schedule, self.axes.pp.rank)
        self._partial = [p for stage in self.stages.values() for p in partial_parameters(stage)]
        self._share_of = self._shares()

    def _make_stages(self, model: nn.Module) -> tuple[dict[int, nn.Module], dict[str, int]]:
        """This rank's stages, and for each key of the model's `state_dict` the rank on the pipeline axis with it."""
        device, mine = self.axes.tp.device, self.schedule.stages(self.axes.pp.rank)
        self._tied_names: list[tuple[str, ...]] = []
        self._stage_of: dict[str, int] = {}
        if self.plan.pp == 1:  # all layers, as the model itself runs them
            return {0: copy.deepcopy(model).to(device)}, dict.fromkeys(model.state_dict(), 0)
        chain = layers(model)
        bounds = stage_bounds(stage_cuts(chain, self.plan), len(chain))
        self._tied_names = tied_names(chain)
        self._stage_of = {
            key: s for s, bound in enumerate(bounds) for layer in chain[slice(*bound)] for key in layer.state_keys()
        }
        stages: dict[int, nn.Module] = {s: Stage(chain[slice(*bounds[s])], device) for s in mine}
        return stages, {key: self.schedule.rank_of[self._stage_of[key]] for key in model.state_dict()}

    def _tie(self) -> None:
        self._tied = TiedWeights(self._tied_names, self._rank_of, self.stages.values(), self.axes.pp)

    def _shares(self) -> dict[nn.Parameter, float]:
        """For each parameter the share of its squared norm that this rank adds, so that all ranks add it up to once."""
        shares = {}
        num_copies = {name: len({self._stage_of[n] for n in group}) for group in self._tied_names for name in group}
        for stage in self.stages.values():
            cuts = cuts_of(stage)
            for name, p in stage.named_parameters():
                num_holders = num_copies.get(name, 1) * (1 if p in cuts else self.plan.tp)
                shares[p] = 1 / (num_holders * (1 if self.plan.zero else self.plan.dp))
        return shares

    def connect(self, comm: Communicator) -> None:
        """Go on in another run of the world, with this rank's communicator there.

        Raises:
            MplabError: it is another rank's.
        """
        check_same_rank(comm, self.comm)
        self.comm, self.axes = comm, Mesh(self.plan.dp, self.plan.pp, self.plan.tp).connect(comm)
        if self._sharded is not None:
            self._sharded.connect_axes(self.axes)
            return
        for stage in self.stages.values():
            connect(stage, self.axes.tp)
        self.replicas.comm = self.axes.dp
        self._tie()

    # -- the model in one piece ----------------------------------------------------------------------------------------

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's ordinary `state_dict`, on every rank, as copies; the optimizer's state is not in it.

        **Communication**: tensor axis: an all_gather of each parameter that is cut; pipeline axis: which rank has what
        (all_gather), and a broadcast of each tensor; data axis: a broadcast of each buffer, and with ZeRO 3 an
        all_gather_ of the weights.
        """
        if self._sharded is not None:
            return self._sharded.full_state_dict()
        whole, dp = self._collect(full_state_dict), self.axes.dp
        return {key: dp.broadcast(x) if key in self.buffers else x for key, x in whole.items()}

    def full_gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step as the whole model has them, by name, on every rank; after clipping.

        Raises:
            MplabError: with ZeRO no rank keeps them whole.

        **Communication**: that of `full_state_dict` on the tensor and the pipeline axis.
        """
        if self.plan.zero:
            raise MplabError(f"zero={self.plan.zero}: no rank keeps whole gradients; look at them with zero=0")
        return self._collect(full_gradients)

    def _collect(self, whole: Callable[[nn.Module, Communicator], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `whole` gives for each stage, of all stages."""
        pp, rank_of = self.axes.pp, self._rank_of
        mine: dict[str, Tensor] = {}
        for stage in self.stages.values():
            mine |= whole(stage, self.axes.tp)
        if pp.size == 1:
            return mine
        has = pp.all_gather(torch.tensor([[key in mine for key in rank_of]], device=pp.device))
        return {
            key: pp.broadcast(mine[key] if rank == pp.rank else None, rank)
            for i, (key, rank) in enumerate(rank_of.items())
            if has[rank, i]
        }

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a whole model's `state_dict`, saved under any plan; the optimizer's state stays.

        Raises:
            MplabError: names or shapes that are not the model's; nothing is changed then.

        **Communication**: none.
        """
        if self._sharded is not None:
            self._sharded.load_full_state_dict(state)
            return
        check_state(state, self._shapes)  # all of it, before this rank changes a stage
        for stage in self.stages.values():
            load_full_state_dict(stage, self.axes.tp, {key: state[key] for key in stage.state_dict()})

    def local_state(self) -> dict[str, Tensor]:
        """What this rank has of the whole `state_dict`: its stages, as they are cut over the tensor axis.

        **Communication**: none; with ZeRO 2 and 3 that of `ShardedDataParallel.full_state_dict` on the data axis.
        """
        if self._sharded is not None:
            return self._sharded.local_state()
        return {key: x for stage in self.stages.values() for key, x in stage.state_dict(keep_vars=True).items()}

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `local_state` gave."""
        if self._sharded is not None:
            self._sharded.load_local_state(state)
            return
        with torch.no_grad():
            for key, x in self.local_state().items():
                x.copy_(state[key])

    def local_cuts(self) -> dict[str, Cut]:
        """How what this rank has is cut over the tensor axis, by name."""
        modules = [self._sharded.model] if self._sharded is not None else self.stages.values()
        return {name: cut for module in modules for name, cut in cuts_by_name(module).items()}

    def slices(self) -> list[Slice]:
        """What this rank updates of each parameter."""
        if self._sharded is not None:
            return self._sharded.slices()
        cuts = {p: cut for stage in self.stages.values() for p, cut in cuts_of(stage).items()}
        return self.replicas.slices(cuts)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Of what this rank updates; None where that is nothing."""
        return self.replicas.optimizer if self._sharded is None else self._sharded.optimizer

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> float:
        """One update.

        Args:
            batch: all of it on every rank, on any device; each replica takes its shard.

        Returns:
            The mean loss over the batch's samples, before the update; the same on every rank.

        Raises:
            MplabError: inputs and targets of different lengths, or fewer samples than replicas and micro-batches need;
                in the first step, batches that differ between the ranks, or (with ZeRO 0 and 1) gradients of what the
                tensor axis has whole.
            NonFiniteGradient: a gradient of this rank has a NaN or an Inf.

        **Communication**: tensor axis: that of the cut layers, for each micro-batch, and of gradients that are parts
        (`sum_gradients`); pipeline axis: activations and their gradients, tied weights' gradients (all_reduce), the
        loss (broadcast); data axis: gradients (all_reduce, or with ZeRO reduce_scatter, and all_gather of weights) and
        a closing all_reduce; with `max_norm` an all_reduce of 8 bytes over all ranks, with ZeRO 2 and 3 one on the data
        and one on the tensor axis; in the first step an all_gather of 8 over all ranks, and with ZeRO 0 and 1 over the
        tensor axis one of 16 for each parameter that is not cut.
        """
        num_samples, num_parts = check_batch(batch), self.plan.num_microbatches
        if not self.num_steps:
            check_same_batch(batch, self.comm)
        if fault := self.plan.too_few(num_samples):
            raise MplabError(fault)
        if self._sharded is not None:
            mean = self._sharded.step(batch)
            self.num_steps += 1
            return mean
        inputs, targets = (tensor.to(self.comm.device) for tensor in shard(batch, self.axes.dp))
        last = self.schedule.num_stages - 1
        interpreter = Interpreter(
            self.schedule,
            self.axes.pp,
            self.stages,
            self._splits,
            self._loss,
            self.plan.recompute,
            inputs.tensor_split(num_parts) if 0 in self.stages else (),
            targets.tensor_split(num_parts) if last in self.stages else (),
            [len(part) / num_samples for part in targets.tensor_split(num_parts)],
        )
        self.replicas.forget_gradients()
        interpreter.run(self._program)
        self._tied.reduce_gradients()
        sum_gradients(self._partial, self.axes.tp)
        if not self.num_steps:
            for stage in self.stages.values():
                check_whole_gradients(stage, self.axes.tp)
        loss = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        for part in interpreter.losses:
            loss += part
        where = f"rank {self.comm.rank}, step {self.num_steps}"
        loss.fill_(self.replicas.reduce(loss, num_samples, where))
        if self.max_norm is not None:
            self._clip(self.max_norm)
        with self.comm.trace.span("update"):
            self.replicas.update()
        self.num_steps += 1
        return float(self.axes.pp.broadcast(loss, self.schedule.rank_of[last]))

    def _loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return parallel_loss(outputs, targets, self.loss_fn, self.axes.tp, self._has_cut_logits)

    def _clip(self, max_norm: float) -> None:
        """As `nn.utils.clip_grad_norm_`, of a gradient that lies on all ranks, some of it on several."""
        squares = torch.zeros(1, dtype=torch.float64, device=self.comm.device)
        for p, grad in self.replicas.gradients():
            squares += self._share_of[p] * squared_norm(grad)
        scale = max_norm / (float(self.comm.all_reduce_(squares).sqrt()) + 1e-6)
        if scale < 1:
            for _, grad in self.replicas.gradients():
                grad.mul_(scale)
