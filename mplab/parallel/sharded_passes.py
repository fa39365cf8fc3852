"""Forward and backward of a chain whose weights or gradients are sharded, and when each of its units is sent.

In stage 3 weights are there while they are used, and each unit (a layer) is gathered while another computes:

    messages   gather 0 | gather 1  | gather 2  |           | gather 1   | reduce 2, gather 0 | reduce 1   | reduce 0
    compute             | forward 0 | forward 1 | forward 2 | backward 2 | backward 1         | backward 0 |

In stages 1 and 2 the weights are there already; in stage 1 the gradients are reduced once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mplab.comm.communicator import Communicator, Handle
from mplab.datasets import Batch
from mplab.errors import MplabError, NonFiniteGradient
from mplab.parallel.flat import Flat, Unit
from mplab.parallel.serial import LossFunction
from mplab.parallel.shares import autocasting


class ShardedPasses:
    """Takes a rank's micro-batches through the units of a model, and back.

    Args:
        units: of the model, in order.
        root: what several of them use.
        stage: of ZeRO, 1 to 3.
        loss_fn: outputs and targets -> mean loss over the samples.
        num_microbatches: parts in which a rank's samples are computed.
        autocast: computes the forward in this dtype where that is safe; None: as the caller has it.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        root: Unit,
        stage: int,
        loss_fn: LossFunction,
        num_microbatches: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.stage, self.loss_fn, self.num_microbatches, self.autocast = stage, loss_fn, num_microbatches, autocast
        self.flats = [flat for unit in (*units, root) for flat in unit.flats]
        self.trained = [flat for unit in (*reversed(units), root) for flat in unit.trained]
        self._units, self._root = units, root
        self._first = [unit.is_trained for unit in units].index(True)  # below it no backward comes
        self._coming: list[Handle[Tensor]] = []
        self._reducing: list[tuple[Flat, Handle[Tensor]]] = []
        self._unit = -1  # whose backward is under way

    def forget(self) -> None:
        """After a step that failed, and may have left anything: drop what was under way, and gathered."""
        self._coming, self._reducing = [], []
        if self.stage == 3:
            for flat in self.flats:
                flat.free()

    def run(self, batch: Batch, num_samples: int, comm: Communicator, where: str) -> list[Tensor]:
        """Forward, backward and reduction of all micro-batches.

        Args:
            batch: this rank's samples, on any device; it may have none, and sends the same messages then.
            num_samples: of all ranks together.
            comm: this rank's communicator.
            where: rank and step, for an error.

        Returns:
            The micro-batches' shares of the mean loss. The flats have this rank's chunks of the gradients.

        Raises:
            MplabError: in stages 2 and 3, a layer that changes its input in place.
            NonFiniteGradient: this rank's gradient has a NaN or an Inf.

        **Communication**: of each unit its gradients (reduce_scatter), in stages 2 and 3 for each micro-batch; in stage
        3 its weights (all_gather_) for each forward and each backward, those of the last one and of the root once.
        """
        self._comm, self._where = comm, where
        if self.stage < 3:
            return self._compute(batch, num_samples)
        try:
            for flat in self.flats:
                flat.show()
            for handle in self._root.gather(comm):
                handle.wait()
            losses = self._compute(batch, num_samples)
            self._root.free()
        finally:
            for flat in self.flats:
                flat.hide()
        return losses

    def _compute(self, batch: Batch, num_samples: int) -> list[Tensor]:
        span, num_parts, losses = self._comm.trace.span, self.num_microbatches, []
        of_parts = (tensor.detach().to(self._comm.device).tensor_split(num_parts) for tensor in batch)
        for j, (inputs, targets) in enumerate(zip(*of_parts, strict=True)):
            microbatch = j if num_parts > 1 else None
            with span("forward", microbatch):
                loss = self._forward(inputs, targets, len(inputs) / num_samples)
            with span("backward", microbatch):
                self._backward(loss)
            if loss is not None:
                losses.append(loss.detach())
            del loss
        if self.stage == 1:
            self._start_reductions(self.trained)
            self._finish_reductions()
        return losses

    def _forward(self, inputs: Tensor, targets: Tensor, weight: float) -> Tensor | None:
        """A micro-batch's share of the mean loss; without samples the same messages, and None."""
        is_sharded, last, x = self.stage == 3, len(self._units) - 1, inputs
        if is_sharded:
            self._start_gather(0)
        with autocasting(self._comm.device, self.autocast):
            for index, unit in enumerate(self._units):
                if is_sharded:
                    self._finish_gather()
                    if index < last:
                        self._start_gather(index + 1)
                if len(inputs):
                    x = self._output(unit, x) if self.stage > 1 and index else unit(x)
                    if is_sharded and index < last and unit.holds(x):
                        x = x.clone()  # not a result, but weights that are freed now
                    if self.stage > 1 and index < last and x.requires_grad:
                        # Called when the units above are over: autograd goes through its nodes from the last one made
                        # to the first, and adds up the gradients of weights at once.
                        x.register_hook(partial(self._reach, index))
                if is_sharded and index < last:
                    unit.free()
            return self.loss_fn(x, targets) * weight if len(inputs) else None

    def _output(self, unit: Unit, x: Tensor) -> Tensor:
        """A unit's output for that of the unit below, which must stay as it is: changed in place it loses its hook."""
        if unit.writes_on_input:
            x = x.clone()
        version = x._version
        y = unit(x)
        if x._version != version and not unit.writes_on_input:
            raise MplabError(
                f"layer {unit.layers[0].name} changes its input in place, and in stage {self.stage} the backward must "
                "be told where one layer ends and the next begins: let it work on x.clone(), or take stage 1"
            )
        return y

    def _backward(self, loss: Tensor | None) -> None:
        """The gradients of a micro-batch; what it does not come to sends the same messages at the end."""
        self._unit = len(self._units) - 1
        if self.stage == 3 and self._unit > self._first:
            self._start_gather(self._unit - 1)
        if loss is not None and loss.requires_grad:
            torch.autograd.backward(loss)
        if self.stage > 1:
            self._reach(-1)
            self._start_reductions(self._root.trained)
            self._finish_reductions()

    def _reach(self, index: int, grad: Tensor | None = None) -> None:
        """The backward of unit `index` is about to begin, and all above it are over."""
        while self._unit > index and self._unit >= self._first:
            # In the order in which they were started: the reduction of the unit above, the weights of the one below.
            unit = self._units[self._unit]
            self._finish_reductions()
            if self.stage == 3:
                unit.free()
                self._finish_gather()
            self._start_reductions(unit.trained)
            if self.stage == 3 and self._unit - 2 >= self._first:
                self._start_gather(self._unit - 2)
            self._unit -= 1

    # -- messages ------------------------------------------------------------------------------------------------------

    def _start_gather(self, index: int) -> None:
        self._coming = self._units[index].gather(self._comm)

    def _finish_gather(self) -> None:
        for handle in self._coming:
            handle.wait()
        self._coming = []

    def _start_reductions(self, flats: Sequence[Flat]) -> None:
        for flat in flats:
            gradient = flat.take_gradient()
            if (name := flat.not_finite(gradient)) is not None:
                raise NonFiniteGradient(
                    f"{self._where}: the gradient of {name} has a NaN or an Inf, and no weight was changed: look at "
                    "this rank's samples and loss, lower the learning rate, or give a max_norm"
                )
            self._reducing.append((flat, self._comm.ireduce_scatter(gradient)))

    def _finish_reductions(self) -> None:
        for flat, handle in self._reducing:
            flat.add_gradient(handle.wait())
        self._reducing = []
