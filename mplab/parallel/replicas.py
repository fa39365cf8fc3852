"""What the replicas of a stage do together: add up their gradients, and update alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.errors import NonFiniteGradient
from mplab.parallel.buckets import Reducer
from mplab.parallel.cut import Cut
from mplab.parallel.data import BUCKET_BYTES
from mplab.parallel.flat import Flat
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.shares import check_frozen, start_close
from mplab.parallel.whole_state import Slice, slices_of


class Replicas:
    """The parameters of one rank, and the same on the ranks of its data axis.

    Args:
        named: by their names in the model, equal on all replicas.
        comm: this rank's communicator on the data axis.
        is_sharded: each replica updates its share of the parameters, and alone keeps the optimizer's state of it
            (ZeRO 1).
        optimizer: makes the optimizer.

    Reference:
        Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020, section 5.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], comm: Communicator, is_sharded: bool, optimizer: OptimizerFactory
    ) -> None:
        self.comm = comm
        trained = {name: p for name, p in named.items() if p.requires_grad}
        self._trained, self._names = list(trained.values()), {p: name for name, p in trained.items()}
        self._frozen = [p for p in named.values() if not p.requires_grad]
        self._flats: list[Flat] = []
        if is_sharded:
            for dtype in dict.fromkeys(p.dtype for p in self._trained):
                of_dtype = {name: p for name, p in trained.items() if p.dtype == dtype}
                self._flats.append(Flat(of_dtype, comm.rank, comm.size, is_sharded=False))
            self._trained = [p for flat in self._flats for p in flat.parameters]
        self._reducer = Reducer(self._names, BUCKET_BYTES, overlap=False)
        pieces = [piece for flat in self._flats for piece in flat.pieces] if is_sharded else self._trained
        self.optimizer = optimizer(pieces) if pieces else None

    def forget_gradients(self) -> None:
        """Before a step."""
        for p in self._trained:
            p.grad = None
        for flat in self._flats:
            flat.forget_gradients()

    def reduce(self, loss: Tensor, num_samples: int, where: str) -> float:
        """Add up the gradients of all replicas; a parameter that none of them used has none.

        Args:
            loss: this replica's share of the mean loss, 0 where it is not known.
            num_samples: of the whole batch.
            where: rank and step, for an error.

        Returns:
            The mean loss.

        Raises:
            NonFiniteGradient: a gradient of this rank has a NaN or an Inf.
            MplabError: a parameter is trained that was frozen at the start.

        **Communication**: one all_reduce_coalesced_ a bucket, or if sharded one reduce_scatter a dtype; one all_reduce_
        of 2 + (trained parameters) float64.
        """
        check_frozen(self._frozen)
        if self._flats:
            chunks = []
            for flat in self._flats:
                gradient = flat.take_gradient()
                if (name := flat.not_finite(gradient)) is not None:
                    raise NonFiniteGradient(
                        f"{where}: the gradient of {name} has a NaN or an Inf; no weight of this rank was changed. "
                        "Look at its samples, lower the learning rate, or clip with max_norm"
                    )
                chunks.append(self.comm.ireduce_scatter(gradient))
            unused = {i for i, is_used in enumerate(self._flags()) if not is_used}
        else:
            with self._reducer.starting(self.comm, where):
                pass
            unused = {i for i, p in enumerate(self._trained) if p in self._reducer.unused}
        finish = start_close(self.comm, loss, num_samples, len(self._trained), unused)
        if self._flats:
            for flat, chunk in zip(self._flats, chunks, strict=True):
                flat.add_gradient(chunk.wait())
        else:
            self._reducer.wait()
        mean, by_nobody = finish()
        place = 0
        for flat in self._flats:
            flat.put_gradients([place + i not in by_nobody for i in range(len(flat.parameters))])
            place += len(flat.parameters)
        if not self._flats:
            for i in by_nobody:
                self._trained[i].grad = None
        return mean

    def _flags(self) -> Iterator[bool]:
        for flat in self._flats:
            yield from flat.is_used

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What this rank updates by: for each parameter its gradient, or if sharded this rank's part of it."""
        for p in () if self._flats else self._trained:
            if p.grad is not None:
                yield p, p.grad
        for flat in self._flats:
            for p, piece in flat.owned():
                if piece.grad is not None:
                    yield p, piece.grad

    def slices(self, cuts: Mapping[Tensor, Cut]) -> list[Slice]:
        """What this rank updates of each parameter."""
        if not self._flats:
            return [Slice(self._names[p], p.shape, cuts.get(p), p, None) for p in self._trained]
        return slices_of(self._flats, cuts)

    def update(self) -> None:
        """Step the optimizer.

        **Communication**: if sharded an all_gather_ a dtype, of the weights.
        """
        if self.optimizer is not None:
            self.optimizer.step()
        for handle in [self.comm.iall_gather_(flat.whole) for flat in self._flats]:
            handle.wait()
