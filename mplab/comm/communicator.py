"""The interface by which ranks talk, the same over threads, CUDA streams and torch.distributed.

A communicator belongs to one rank of one group. Every rank of the group calls the same collectives in the same order;
what it says it calls (a `Call`) travels with the data and is compared, because a backend alone may answer a
disagreement with wrong numbers.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mplab.comm.calls import Call, Caller
from mplab.comm.ledger import Ledger, Message
from mplab.errors import MplabError
from mplab.plan.traffic import Traffic
from mplab.trace.recorder import Mark, Recorder

T = TypeVar("T")


class Handle(Generic[T]):
    """An operation under way. `wait()` finishes it and returns its result; a second `wait()` returns the same again."""

    __slots__ = ("_finish", "_result")

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        """Finish the operation and return its result (None for a send)."""
        if self._finish is not None:
            # Forget the closure first: it holds tensors that nobody needs after this.
            finish, self._finish = self._finish, None
            self._result = finish()
        return self._result

    def advance(self) -> None:
        """Do this rank's part of it if that takes no waiting; nothing where a backend goes on by itself."""


class Communicator(Caller, abc.ABC):
    """Sends, receives and collectives of one rank in one group.

    A collective returns a new tensor, outside autograd; names that end in `_` work in place. Names that begin with `i`
    start an operation and return a `Handle`: leave its input alone until `wait()`, and wait in the order of starting;
    between threads a large collective goes on only while its ranks wait for it. Inputs may be non-contiguous or empty,
    of any dtype that torch can add. Ranks are counted within the group.

    Args:
        rank: this rank's place in the group.
        ranks: world ranks of the group, in order.
        device: where its tensors live.
        ledger: counts what this rank sends and receives, over all of its groups.
        trace: writes down when.
    """

    def __init__(
        self, rank: int, ranks: tuple[int, ...], device: torch.device, ledger: Ledger, trace: Recorder
    ) -> None:
        super().__init__(rank, ranks, device)
        self._others = tuple(r for r in ranks if r != ranks[rank])
        self.ledger = ledger
        self.trace = trace

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.size}, world ranks {list(self.ranks)}, {self.device})"

    # -- one rank to another ------------------------------------------------------------------------------------------

    def send(self, x: Tensor, dst: int, tag: int = 0) -> None:
        """Send `x` to rank `dst`; `x` may be changed as soon as this returns.

        Args:
            x: any shape and dtype.
            dst: the receiver's rank in this group.
            tag: messages of one pair with different tags may be received in any order.

        Raises:
            MplabError: no such rank, the rank itself, or a tensor on another device.

        **Communication**: 1 message of `x`'s bytes to `dst`.
        """
        self.isend(x, dst, tag).wait()

    def recv(self, src: int, tag: int = 0) -> Tensor:
        """The next tensor that rank `src` sent here with this tag, of the shape and dtype it was sent with."""
        return self.irecv(src, tag).wait()

    def isend(self, x: Tensor, dst: int, tag: int = 0) -> Handle[None]:
        """Start a `send`."""
        self._check_tensor(x, "isend")
        return self._start_send(x.detach(), self._check_peer(dst, "dst"), tag)

    def irecv(self, src: int, tag: int = 0) -> Handle[Tensor]:
        """Start a `recv`."""
        return self._start_recv(self._check_peer(src, "src"), tag)

    # -- all ranks of the group ---------------------------------------------------------------------------------------

    def broadcast(self, x: Tensor | None, root: int = 0) -> Tensor:
        """Rank `root`'s tensor, on every rank.

        Args:
            x: any shape on the root; elsewhere None, or a tensor whose shape and dtype must be the root's.
            root: whose tensor.

        **Communication**: the root sends n - 1 messages of `x`'s bytes.
        """
        return self._run(self._rooted_call("broadcast", x, root), x)

    def reduce(self, x: Tensor, op: str = "sum", root: int = 0) -> Tensor | None:
        """The reduction over all ranks, in rank order: a tensor on `root`, None elsewhere.

        **Communication**: every rank but the root sends 1 message of `x`'s bytes.
        """
        self._check_root(root)
        out = self._run(self._reduction_call("reduce", x, op)._replace(root=root), x)
        return out if self.rank == root else None

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """The reduction over all ranks, in rank order, as a new tensor on every rank.

        Args:
            x: any shape, the same on every rank.
            op: "sum", "mean", "max", "min" or "product".

        **Communication**: 2(n-1) messages, 2(n-1)/n of `x`'s bytes: every rank reduces one chunk and sends it to all
        others.

        **Reference**: Rabenseifner, "Optimization of Collective Reduction Operations", 2004, section 3.
        """
        return self._run(self._reduction_call("all_reduce", x, op), x)

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        """`all_reduce` into `x` itself, which is returned: no memory is allocated."""
        self._run(self._reduction_call("all_reduce_", x, op), x)
        return x

    def all_reduce_coalesced_(self, xs: Sequence[Tensor], op: str = "sum") -> None:
        """`all_reduce_` of many tensors as if they were one: their elements, one tensor's after another's.

        Args:
            xs: one or more of one dtype, of any shapes, the same on every rank.
            op: as in `all_reduce`.

        **Communication**: that of one `all_reduce` of all elements.
        """
        self.iall_reduce_coalesced_(xs, op).wait()

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """All ranks' tensors, concatenated along `dim` in rank order.

        Args:
            x: at least 1-D; ranks may differ in the size of `dim`, and in nothing else.
            dim: along which to concatenate.

        **Communication**: n - 1 messages of `x`'s bytes a rank.
        """
        return self._run(self._gather_call("all_gather", x, dim), x)

    def all_gather_(self, x: Tensor) -> Tensor:
        """`all_gather` into `x` itself, which is returned: each rank gives its chunk of it, and gets all others'.

        Args:
            x: contiguous, at least 1-D, the same shape on every rank; chunk `rank` of `x.tensor_split(n)` is what this
                rank gives.

        **Communication**: n - 1 messages of its chunk's bytes a rank.
        """
        self._run(self._gather_in_place_call(x), x)
        return x

    def reduce_scatter(self, x: Tensor, op: str = "sum", dim: int = 0) -> Tensor:
        """This rank's chunk of the reduction over all ranks: chunk `rank` of `x.tensor_split(n, dim)`.

        Args:
            x: at least 1-D, the same shape on every rank; n need not divide its size (the first chunks are one longer
                then).
            op: as in `all_reduce`.
            dim: along which to split.

        **Communication**: n - 1 messages a rank, all chunks but its own.
        """
        return self._run(self._reduce_scatter_call(x, op, dim), x)

    def scatter(self, x: Tensor | None, root: int = 0, dim: int = 0) -> Tensor:
        """This rank's chunk of rank `root`'s tensor, as `x.tensor_split(n, dim)` cuts it; `x` is None off the root.

        **Communication**: the root sends n - 1 messages, all chunks but its own.
        """
        x = x if self.rank == root else None
        call = self._rooted_call("scatter", x, root)._replace(dim=dim)
        if x is not None:
            self._check_dim(x, dim, "scatter")
        return self._run(call, x)

    def gather(self, x: Tensor, root: int = 0, dim: int = 0) -> Tensor | None:
        """All ranks' tensors, concatenated along `dim` in rank order, on `root`; None elsewhere.

        **Communication**: every rank but the root sends 1 message of its tensor's bytes.
        """
        self._check_root(root)
        out = self._run(self._gather_call("gather", x, dim)._replace(root=root), x)
        return out if self.rank == root else None

    def all_to_all(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Element j of every rank's list, as a list in rank order on rank j.

        Args:
            xs: n tensors of one dtype, of any shapes; `xs[j]` goes to rank j.

        **Communication**: n - 1 messages a rank, all elements but its own.
        """
        if len(xs) != self.size:
            raise MplabError(f"all_to_all needs one tensor for each of {self.size} ranks, got {len(xs)}")
        for x in xs:
            self._check_tensor(x, "all_to_all")
        if len({x.dtype for x in xs}) > 1:
            raise MplabError(
                f"all_to_all needs tensors of one dtype, got {sorted({str(x.dtype) for x in xs})}: convert them first"
            )
        return self._start_all_to_all(Call("all_to_all", dtype=xs[0].dtype), [x.detach() for x in xs]).wait()

    def barrier(self) -> None:
        """Wait until every rank of the group is here.

        **Communication**: n - 1 empty messages a rank.
        """
        self._run(Call("barrier"), None)

    # -- started now, finished later ----------------------------------------------------------------------------------

    def iall_reduce(self, x: Tensor, op: str = "sum") -> Handle[Tensor]:
        """Start an `all_reduce`."""
        return self._start(self._reduction_call("all_reduce", x, op), x)

    def iall_reduce_(self, x: Tensor, op: str = "sum") -> Handle[Tensor]:
        """Start an `all_reduce_`."""
        return self._start(self._reduction_call("all_reduce_", x, op), x)

    def iall_reduce_coalesced_(self, xs: Sequence[Tensor], op: str = "sum") -> Handle[None]:
        """Start an `all_reduce_coalesced_`."""
        call = self._coalesced_call("all_reduce_coalesced_", xs, op)
        return self._start_coalesced(call, [x.detach() if x.requires_grad else x for x in xs])

    def iall_gather(self, x: Tensor, dim: int = 0) -> Handle[Tensor]:
        """Start an `all_gather`."""
        return self._start(self._gather_call("all_gather", x, dim), x)

    def iall_gather_(self, x: Tensor) -> Handle[Tensor]:
        """Start an `all_gather_`."""
        return self._start(self._gather_in_place_call(x), x)

    def ireduce_scatter(self, x: Tensor, op: str = "sum", dim: int = 0) -> Handle[Tensor]:
        """Start a `reduce_scatter`."""
        return self._start(self._reduce_scatter_call(x, op, dim), x)

    # -- what a backend provides --------------------------------------------------------------------------------------

    @abc.abstractmethod
    def group(self, ranks: Sequence[int]) -> Communicator:
        """A communicator of some of this group's ranks; each of them calls this with the same list.

        Args:
            ranks: ranks of this group, in the new group's order, this rank among them.

        Raises:
            MplabError: a rank twice, out of range, or a list without this rank.
        """

    @abc.abstractmethod
    def _start_send(self, x: Tensor, dst: int, tag: int) -> Handle[None]: ...

    @abc.abstractmethod
    def _start_recv(self, src: int, tag: int) -> Handle[Tensor]: ...

    @abc.abstractmethod
    def _start(self, call: Call, x: Tensor | None) -> Handle[Tensor]:
        """Start any collective of one tensor; where a rank gets nothing (`reduce` off the root) the result is empty."""

    def _run(self, call: Call, x: Tensor | None) -> Tensor:
        """Start a collective and finish it; a backend may have a shorter way."""
        return self._start(call, x).wait()

    def _start_coalesced(self, call: Call, xs: list[Tensor]) -> Handle[None]:
        """Start a reduction of many tensors in place: of their copy in one row, unless a backend has a shorter way."""
        joined = torch.cat([x.reshape(-1) for x in xs])
        handle = self._start(call, joined)

        def finish() -> None:
            total = handle.wait()
            for x, part in zip(xs, total.split([x.numel() for x in xs]), strict=True):
                x.copy_(part.view(x.shape))

        return Handle(finish)

    @abc.abstractmethod
    def _start_all_to_all(self, call: Call, xs: list[Tensor]) -> Handle[list[Tensor]]: ...

    # -- what every backend writes down -------------------------------------------------------------------------------

    def _write_down(
        self,
        name: str,
        traffic: Traffic,
        begin_ns: int,
        mark: Mark,
        met: Mark,
        on_the_way: tuple[Mark, Mark] | None = None,
    ) -> None:
        """A collective that is over: it waited from `mark` to `met`, and messages took the time since.

        Where it is known from when to when its messages were on the way, which may have been before anyone waited, the
        wait is what was left of that time.
        """
        now = self.trace.now()
        self.trace.add("wait", name, mark, met if on_the_way is None else now)
        start, end = on_the_way or (met, now)
        self.trace.add("message", name, start, end, traffic.sent_bytes)
        num_sent, sent_bytes, _, received_bytes = traffic
        end_ns = time.perf_counter_ns()
        self.ledger.add(Message(name, self.ranks, self._others, num_sent, sent_bytes, received_bytes, begin_ns, end_ns))
