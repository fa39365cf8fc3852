"""Sharded data parallelism (ZeRO): of what all n ranks need, each keeps a part.

    kept by a rank   weights   gradients   optimizer's state
    stage 1          all       all         1/n
    stage 2          all       1/n         1/n
    stage 3          1/n       1/n         1/n

When each unit (a layer) is gathered and reduced is in `mplab.parallel.sharded_passes`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.datasets import Batch, shard
from mplab.errors import MplabError
from mplab.models import cross_entropy, layers
from mplab.parallel.agree import check_agreement
from mplab.parallel.flat import make_units, merged_state, split_state
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.parallel.sharded_passes import ShardedPasses
from mplab.parallel.shares import (
    broadcast_state,
    check_same_rank,
    check_training,
    close_step,
    described,
    squared_norm,
    total_samples,
)


class ShardedDataParallel:
    """Trains a model on every rank's share of a batch, as `Serial` would on all of it, in less memory than it takes.

    The optimizer gets this rank's pieces of the parameters, each with one dim: it must treat every element alike, as
    SGD and Adam do. Of P bytes of trained parameters and m micro-batches a rank sends and receives (n - 1)/n of:

    - stage 1: P of gradients and P of weights, as much as an all-reduce. The gradients of micro-batches add up whole,
      and are reduced once.
    - stage 2: m P of gradients and P of weights. A unit's gradients are reduced as soon as its backward is over, for
      each micro-batch, so that no more than 1/n of them is kept.
    - stage 3: m P of gradients, and up to 2 m times all weights, frozen ones too, gathered for each forward and once
      more for each backward. The last unit stays from forward to backward; those below the first trained one have no
      backward.

    A unit is a layer, with those after it that have no parameters. What several units use (tied weights) makes a unit
    of its own, the root, which is gathered once a step and stays for all of it. Between steps the weights of `model`
    have no memory in stage 3: `full_state_dict()` has them.

    Args:
        model: what `mplab.models.layers` can turn into a chain; it is copied, and never changed.
        comm: this rank's communicator.
        stage: 1 shards the optimizer's state, 2 gradients too, 3 weights too.
        loss_fn: outputs and targets -> mean loss over the samples.
        optimizer: makes the optimizer of this rank's pieces.
        num_microbatches: parts in which a rank's samples are computed before the one update.
        max_norm: longest gradient (2-norm over all parameters); a longer one is scaled down to it. None: any.
        autocast: `torch.bfloat16` computes the forward in it where that is safe; autograd then keeps a bfloat16 copy of
            each weight of a matrix product until its backward, also in stage 3.

    Raises:
        MplabError: a model that is no chain or has nothing to train, another stage, dtype or setting than these, or
            ranks that were given different ones; before any training.

    **Communication**: at the start, the settings (all_gather), weights and buffers of rank 0 (broadcast).

    Reference:
        Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020, sections 5
        and 7.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        stage: int = 3,
        loss_fn: LossFunction = cross_entropy,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        num_microbatches: int = 1,
        max_norm: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if stage not in (1, 2, 3):
            raise MplabError(
                f"stage {stage}: must be 1 (optimizer's state sharded), 2 (gradients too) or 3 (weights too)"
            )
        layers(model)  # refuses what is no chain
        check_training(model, loss_fn, optimizer, num_microbatches, max_norm, autocast)
        check_agreement(
            comm,
            {
                "stage": stage,
                "num_microbatches": num_microbatches,
                "max_norm": max_norm,
                "autocast": str(autocast),
                "parameters": described(model),
            },
        )
        self.comm, self.stage, self.loss_fn = comm, stage, loss_fn
        self.num_microbatches, self.max_norm, self.autocast = num_microbatches, max_norm, autocast
        self.num_steps = 0
        self.model = copy.deepcopy(model).to(comm.device)
        broadcast_state(self.model, comm)
        units, root = make_units(self.model, comm, is_sharded=stage == 3)
        self._passes = ShardedPasses(units, root, stage, loss_fn, num_microbatches, autocast)
        self._flats, self._trained = self._passes.flats, self._passes.trained
        pieces = [piece for flat in self._trained for piece in flat.pieces]
        self.optimizer = optimizer(pieces) if pieces else None
        self._is_in_step = False
        if stage == 3:
            self.model.register_forward_pre_hook(_refuse_call)

    def connect(self, comm: Communicator) -> None:
        """Go on in another run of the world, with this rank's communicator there.

        Raises:
            MplabError: it is another rank's.
        """
        check_same_rank(comm, self.comm)
        self.comm = comm

    # -- the model in one piece ----------------------------------------------------------------------------------------

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's ordinary `state_dict`, on every rank, as copies; the optimizer's state is not in it.

        **Communication**: in stage 3 all weights (all_gather_), in every stage rank 0's buffers (broadcast).
        """
        return merged_state(self.model, self._flats, self.comm)

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's share of a whole model's `state_dict`; the optimizer's state stays as it is.

        Args:
            state: of the model, from any number of ranks or any stage, or of the model by itself; the same on every
                rank.

        Raises:
            MplabError: other names or shapes than the model's; nothing has changed then.

        **Communication**: none.
        """
        split_state(self.model, self._flats, state)

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> float:
        """One update.

        Args:
            batch: all of it on every rank, on any device; each takes its share, `mplab.datasets.shard`.

        Returns:
            The mean loss over the batch's samples, before the update; the same on every rank.

        Raises:
            MplabError: inputs and targets of different lengths, no samples, or batches of different sizes on the ranks;
                in stages 2 and 3 a layer that changes its input in place.
            NonFiniteGradient: this rank's gradient has a NaN or an Inf; no weight has changed then, on any rank.

        **Communication**: of each unit its gradients (reduce_scatter) and its weights (all_gather_), as often as the
        stage has it; one all_reduce_ of 2 + number of trained parameters float64: the loss, the batch size, and which
        parameters were used; with `max_norm` one of 8 bytes.
        """
        return self._step(shard(batch, self.comm), len(batch[0]))

    def step_shard(self, batch: Batch) -> float:
        """`step` on this rank's own samples; ranks may have different numbers of them, and some none.

        **Communication**: as `step`, and all_gather of 8 bytes, the number of samples.
        """
        return self._step(batch, total_samples(batch, self.comm))

    def _step(self, batch: Batch, num_samples: int) -> float:
        """One update on this rank's part of `num_samples`."""
        for flat in self._trained:
            flat.forget_gradients()
        if self._is_in_step:  # it failed, and may have left anything
            self.model.zero_grad()
            self._passes.forget()
        self._is_in_step = True
        where = f"rank {self.comm.rank}, step {self.num_steps}"
        losses = self._passes.run(batch, num_samples, self.comm, where)
        mean = self._close(losses, num_samples)
        with self.comm.trace.span("update"):
            if self.optimizer is not None:
                self.optimizer.step()
        if self.stage < 3:
            for handle in [self.comm.iall_gather_(flat.whole) for flat in self._trained]:
                handle.wait()
        self._is_in_step = False
        self.num_steps += 1
        return mean

    def _close(self, losses: list[Tensor], num_samples: int) -> float:
        """Exchange the loss and what was used; give the optimizer its gradients, clipped."""
        loss = torch.stack(losses).sum(dtype=torch.float64) if losses else torch.zeros(())
        used = list(itertools.chain.from_iterable(flat.is_used for flat in self._trained))
        unused = {index for index, is_used in enumerate(used) if not is_used}
        mean, by_nobody = close_step(self.comm, loss, num_samples, len(used), unused)
        place = 0
        for flat in self._trained:
            flat.put_gradients([place + index not in by_nobody for index in range(len(flat.parameters))])
            place += len(flat.parameters)
        self._finish_gradients()
        return mean

    def _finish_gradients(self) -> None:
        """Clip, as `nn.utils.clip_grad_norm_`, a gradient whose chunks lie on all ranks."""
        if self.max_norm is None:
            return
        scale = self.max_norm / (float(self._squares().sqrt()) + 1e-6)
        if scale < 1:
            for flat in self._trained:
                if flat.gradient is not None:
                    flat.gradient.mul_(scale)

    def _squares(self) -> Tensor:
        """The squared norm of the gradient, one element."""
        chunks = [flat.gradient for flat in self._trained if flat.gradient is not None]
        return self.comm.all_reduce_(torch.stack([squared_norm(chunk) for chunk in chunks]).sum().reshape(1))


def _refuse_call(model: nn.Module, inputs: object) -> None:
    raise MplabError(
        f"in stage 3 this {type(model).__name__} has its weights only while step() uses them: load full_state_dict() "
        "into a model of your own, and call that"
    )
