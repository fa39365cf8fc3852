"""ZeRO 2 and 3 among the replicas of a model whose layers are cut over a tensor axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mplab.comm.mesh import MeshCommunicator
from mplab.parallel.cut import cuts_by_name, cuts_of
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.parallel.sharded import ShardedDataParallel
from mplab.parallel.shares import squared_norm
from mplab.parallel.tensor_model import connect
from mplab.parallel.tensor_state import merge, partial_parameters, split, sum_in_place
from mplab.parallel.whole_state import Slice, slices_of


class ShardedReplicas(ShardedDataParallel):
    """`ShardedDataParallel` on the data axis, of a model that is cut over the tensor axis.

    Args:
        model: what `tensor_parallel` gave, or a whole one where the tensor axis has one rank.
        axes: this rank's communicators.
        stage: of ZeRO.
        loss_fn: outputs and targets -> mean loss over the samples.
        optimizer: makes the optimizer of this rank's pieces.
        num_microbatches: parts in which a rank's samples are computed before the one update.
        max_norm: longest gradient over all parameters of the model, each counted once. None: any.

    **Communication**: that of `ShardedDataParallel` on the data axis; on the tensor axis that of the cut layers, and
    one all_reduce_coalesced_ of this rank's pieces of those gradients that are parts; with `max_norm` an all_reduce_ of
    8 bytes on each axis.
    """

    def __init__(
        self,
        model: nn.Module,
        axes: MeshCommunicator,
        stage: int,
        loss_fn: LossFunction,
        optimizer: OptimizerFactory,
        num_microbatches: int,
        max_norm: float | None,
    ) -> None:
        super().__init__(model, axes.dp, stage, loss_fn, optimizer, num_microbatches, max_norm)
        self._tp = axes.tp
        self._partial, self._cuts = set(partial_parameters(self.model)), cuts_of(self.model)

    def connect_axes(self, axes: MeshCommunicator) -> None:
        """`connect`, on both axes."""
        self.connect(axes.dp)
        connect(self.model, axes.tp)
        self._tp = axes.tp

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's ordinary `state_dict`, on every rank, as copies.

        **Communication**: that of `ShardedDataParallel`; an all_gather of each parameter that is cut.
        """
        return merge(super().full_state_dict(), cuts_by_name(self.model), self._tp)

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's share of a whole model's `state_dict`.

        Raises:
            MplabError: other names or shapes than the model's; nothing has changed then.

        **Communication**: none.
        """
        super().load_full_state_dict(split(state, cuts_by_name(self.model), self._tp))

    def local_state(self) -> dict[str, Tensor]:
        """The `state_dict` of the model as it is cut, on every rank of the data axis.

        **Communication**: that of `ShardedDataParallel.full_state_dict`.
        """
        return super().full_state_dict()

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's share of what `local_state` gave."""
        super().load_full_state_dict(state)

    def slices(self) -> list[Slice]:
        """What this rank updates of each parameter."""
        return slices_of(self._trained, self._cuts)

    def _finish_gradients(self) -> None:
        sum_in_place((grad for p, grad in self._owned() if p in self._partial), self._tp)
        super()._finish_gradients()

    def _squares(self) -> Tensor:
        squares = torch.zeros(1, dtype=torch.float64, device=self.comm.device)
        for p, grad in self._owned():
            share = 1 if p in self._cuts else 1 / self._tp.size  # all ranks of the tensor axis have the whole of it
            squares += share * squared_norm(grad)
        return self._tp.all_reduce_(self.comm.all_reduce_(squares))

    def _owned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parameters of which this rank has a piece, and the gradient of that."""
        for flat in self._trained:
            for p, piece in flat.owned():
                if piece.grad is not None:
                    yield p, piece.grad
