"""Data parallelism: every rank has the whole model, takes its shard of the batch, and all add up their gradients.

    rank 0: shard 0 -> forward -> backward -> g0 --+             +--> update
                                                   +- g0 + g1 ---+
    rank 1: shard 1 -> forward -> backward -> g1 --+             +--> update

Equal weights then stay equal, after equal updates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.datasets import Batch, shard
from mplab.errors import MplabError
from mplab.models import cross_entropy
from mplab.parallel.agree import check_agreement
from mplab.parallel.buckets import Reducer
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.parallel.shares import (
    autocasting,
    broadcast_state,
    check_count,
    check_frozen,
    check_same_rank,
    check_training,
    described,
    start_close,
    total_samples,
)

BUCKET_BYTES = 25 << 20


class DataParallel:
    """Trains a model on shards of each batch, as `Serial` would train it on the whole batch.

    Args:
        model: any module. Each rank copies it, and the model itself is never changed; all copies start with rank 0's
            weights and buffers.
        comm: this rank's communicator.
        bucket_bytes: gradients are reduced in buckets of so many bytes at most; a larger one has a bucket of its own.
        overlap: reduce a bucket as soon as it is full, while backward goes on (on CUDA on a stream of its own); False:
            all of them after backward.
        loss_fn: outputs and targets -> mean loss over the samples.
        optimizer: makes the optimizer of the model's parameters.
        num_microbatches: parts in which a shard is computed before the one update (gradient accumulation); the
            gradients are reduced with the last of them.
        max_norm: longest gradient (2-norm over all parameters); a longer one is scaled down to it. None: any.
        autocast: `torch.bfloat16` computes the forward in it where that is safe; weights, gradients and their sums stay
            as they are.

    Raises:
        MplabError: a setting out of its range, nothing to train, or ranks that were given different settings; before
            any training.

    **Communication**: at the start, the settings (all_gather), weights and buffers (broadcast).

    Reference:
        Li et al., "PyTorch Distributed: Experiences on accelerating data parallel training", VLDB 2020, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        bucket_bytes: int = BUCKET_BYTES,
        overlap: bool = True,
        loss_fn: LossFunction = cross_entropy,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        num_microbatches: int = 1,
        max_norm: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        check_count("bucket_bytes", bucket_bytes)
        check_training(model, loss_fn, optimizer, num_microbatches, max_norm, autocast)
        self.comm, self.loss_fn, self.num_microbatches, self.max_norm = comm, loss_fn, num_microbatches, max_norm
        self.autocast = autocast
        self.model = copy.deepcopy(model).to(comm.device)
        names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        check_agreement(
            comm,
            {
                "bucket_bytes": bucket_bytes,
                "num_microbatches": num_microbatches,
                "max_norm": max_norm,
                "autocast": str(autocast),
                "parameters": described(self.model),
            },
        )
        broadcast_state(self.model, comm)
        self._reducer = Reducer(names, bucket_bytes, overlap)
        self.buckets = self._reducer.buckets
        self.optimizer = optimizer(list(self.model.parameters()))
        self.num_steps = 0
        self._trained, self._is_syncing, self._is_reduced = list(names), True, False
        self._frozen = [p for p in self.model.parameters() if not p.requires_grad]

    def connect(self, comm: Communicator) -> None:
        """Go on in another run of the world, with this rank's communicator there.

        Raises:
            MplabError: it is another rank's.
        """
        check_same_rank(comm, self.comm)
        self.comm = comm

    def state_dict(self) -> dict[str, Tensor]:
        """The model's ordinary `state_dict`: every rank has all of it. **Communication**: none."""
        return self.model.state_dict()

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> float:
        """One update; afterwards the gradients of the whole batch can still be read, on every rank.

        Args:
            batch: all of it on every rank, on any device; each rank takes its `shard`. Shards may differ by one sample:
                the loss weighs samples, not ranks.

        Returns:
            The mean loss over the batch's samples, before the update; the same on every rank.

        Raises:
            MplabError: inputs and targets of different lengths, no samples, or batches of different lengths on the
                ranks; inside `no_sync()`.
            NonFiniteGradient: a gradient of this rank has a NaN or an Inf.

        **Communication**: one all_reduce_coalesced_ a bucket; one all_reduce_ of 2 + (trained parameters) float64: the
        loss, the batch's size, and who has a gradient for what.
        """
        return self._step(shard(batch, self.comm), len(batch[0]))

    def step_shard(self, mine: Batch) -> float:
        """`step` for ranks that bring their samples themselves, as many as they have, from none upwards.

        **Communication**: that of `step`; before it all_gather of the numbers of samples, 8 bytes a rank.
        """
        num_samples = total_samples(mine, self.comm)
        return self._step(mine, num_samples)

    def _step(self, mine: Batch, num_samples: int) -> float:
        if not self._is_syncing:
            raise MplabError("step inside no_sync(): each rank would update by its own gradients; call backward there")
        self.optimizer.zero_grad()
        self._is_reduced = False
        inputs, targets = (tensor.to(self.comm.device) for tensor in mine)
        parts = [
            part
            for part in zip(*(t.tensor_split(self.num_microbatches) for t in (inputs, targets)), strict=True)
            if len(part[0])
        ]
        total = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        span = self.comm.trace.span
        for j, (part_inputs, part_targets) in enumerate(parts):
            microbatch = j if self.num_microbatches > 1 else None
            with span("forward", microbatch), autocasting(self.comm.device, self.autocast):
                loss = self.loss_fn(self.model(part_inputs), part_targets) * (len(part_inputs) / num_samples)
            total += loss.detach()
            is_last = j == len(parts) - 1
            with nullcontext() if is_last else self.no_sync():
                self._backward(loss, microbatch)
        if not parts:  # no sample of this batch came here, and the others wait for this rank's zeros
            self._backward(None, None)
        mean = self._close(total, num_samples)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self._trained, self.max_norm)
        with span("update"):
            self.optimizer.step()
        return mean

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only add to this rank's gradients: they are reduced with those of a later one."""
        before, self._is_syncing = self._is_syncing, False
        try:
            yield
        finally:
            self._is_syncing = before

    def backward(self, loss: Tensor) -> None:
        """For a loop of your own in place of `step`: backward, and all ranks' gradients added up on the way.

        Args:
            loss: this rank's share of the loss, of `self.model`'s outputs: shares add up to the loss of all.

        Raises:
            MplabError: the gradients of the last update are still there, and would be added up once more.
            NonFiniteGradient: a gradient of this rank has a NaN or an Inf.

        **Communication**: as in `step`; none inside `no_sync()`.
        """
        if self._is_reduced and any(p.grad is not None and bool(p.grad.any()) for p in self._trained):
            raise MplabError(
                "these gradients are the sum over all ranks already, and another backward would add them up once more: "
                "call optimizer.zero_grad() first, or accumulate inside no_sync()"
            )
        self._is_reduced = False
        self._backward(loss, None)
        if self._is_syncing:
            self._close(loss.detach().double(), 0)

    def _backward(self, loss: Tensor | None, microbatch: int | None) -> None:
        check_frozen(self._frozen)
        with self._reducing():
            if loss is not None and loss.requires_grad:  # else no trained parameter had a part in it
                with self.comm.trace.span("backward", microbatch):
                    loss.backward()

    def _reducing(self) -> AbstractContextManager[Any]:
        if not self._is_syncing:
            return nullcontext()
        where = f"rank {self.comm.rank}, step {self.num_steps}"
        return self._reducer.starting(self.comm, where)

    def _close(self, loss: Tensor, num_samples: int) -> float:
        """The last message of a step, and all gradients are there.

        A parameter that no rank has used is as if this backward had not been.
        """
        unused = {index for index, p in enumerate(self._trained) if p in self._reducer.unused}
        finish = start_close(self.comm, loss, num_samples, len(self._trained), unused)
        self._reducer.wait()
        mean, by_nobody = finish()
        for index in by_nobody:
            self._trained[index].grad = None
        self._is_reduced = True
        self.num_steps += 1
        return mean
