"""Gradients in buckets, each reduced as soon as backward has filled it, while backward goes on.

    backward   | g6 g5 g4 | g3 g2 | g1 g0 |
    messages              [bucket 0][bucket 1][bucket 2]

All ranks start their buckets in the same order, the order in which they were made, whatever order their gradients come
in: a bucket that a rank's backward has not filled holds back those after it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator, Handle
from mplab.errors import MplabError, NonFiniteGradient
from mplab.private import is_shared, norms


class Bucket:
    """Parameters whose gradients are reduced together.

    Args:
        parameters: of one dtype.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.num_bytes = sum(p.nbytes for p in parameters)
        self.ready: set[nn.Parameter] = set()  # those whose gradient this backward has computed already

    @property
    def is_full(self) -> bool:
        """Whether this backward has computed all of its gradients."""
        return len(self.ready) == len(self.parameters)


def make_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[Bucket]:
    """Buckets of `bucket_bytes` at most, the last parameters first: backward computes their gradients first.

    Args:
        parameters: in the order in which the model has them.
        bucket_bytes: a bucket has no more, unless it is of one parameter; nor parameters of two dtypes.

    **Reference**: Li et al., "PyTorch Distributed: Experiences on accelerating data parallel training", VLDB 2020,
    section 3.2.3.
    """
    buckets: list[list[nn.Parameter]] = []
    for p in reversed(parameters):
        last = buckets[-1] if buckets else []
        if not last or last[0].dtype != p.dtype or sum(q.nbytes for q in last) + p.nbytes > bucket_bytes:
            buckets.append([])
        buckets[-1].append(p)
    return [Bucket(bucket) for bucket in buckets]


class Reducer:
    """Adds up the gradients of all ranks, in place, bucket by bucket.

    Args:
        names: every trained parameter, and its name in the model.
        bucket_bytes: size of a bucket.
        overlap: start a bucket as soon as it is full; False: all of them after backward, as the last one in any case.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], bucket_bytes: int, overlap: bool) -> None:
        self.names = names
        self.buckets = make_buckets(list(names), bucket_bytes)
        self._comm: Communicator | None = None  # while the gradients of a backward are reduced
        self.unused: set[nn.Parameter] = set()  # of the last backward: without a gradient on this rank
        self._num_started = 0
        self._handles: list[Handle[None]] = []
        self._sizes: list[tuple[Bucket, Tensor]] = []
        self._side: torch.cuda.Stream | None = None
        if overlap:
            for index, bucket in enumerate(self.buckets[:-1]):
                hook = self._hook(index)
                for p in bucket.parameters:
                    p.register_post_accumulate_grad_hook(hook)

    @contextmanager
    def starting(self, comm: Communicator, where: str) -> Iterator[None]:
        """Start to reduce the gradients of the backward inside, at the end of it those of the last buckets.

        A parameter that this rank's backward has not reached counts as zeros.

        Args:
            comm: this rank's communicator.
            where: rank and step, for an error.

        Raises:
            NonFiniteGradient: a gradient of this rank has a NaN or an Inf.

        **Communication**: one iall_reduce_coalesced_ a bucket.
        """
        self._comm, self._where, self._num_started = comm, where, 0
        self.unused.clear()
        self._sizes.clear()
        self._handles.clear()
        if comm.device.type == "cuda" and self._side is None:
            self._side = torch.cuda.Stream(comm.device)
        for bucket in self.buckets:
            bucket.ready.clear()
        try:
            yield
            for bucket in self.buckets[self._num_started :]:
                self._start(bucket)
            for bucket, sizes in self._sizes:
                self._check(bucket, sizes)
        finally:
            self._comm = None

    def wait(self) -> None:
        """Wait until all that was started is over: on every rank all gradients are those of all ranks."""
        with self._aside(waits=False):
            for handle in self._handles:
                handle.wait()
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        self._handles.clear()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        # Weakly: the garbage collector does not see what torch's hook holds, and would never free the parameters.
        reducer = weakref.ref(self)

        def ready(p: Tensor) -> None:
            me = reducer()
            if me is not None and me._comm is not None:  # else it is only added to the gradients of earlier backwards
                me._take(p, me.buckets[index])

        return ready

    def _take(self, p: Tensor, bucket: Bucket) -> None:
        """A gradient is there: start the buckets that are full."""
        assert isinstance(p, nn.Parameter)
        assert p.grad is not None
        if p in bucket.ready:
            raise MplabError(
                f"{self.names[p]} got a second gradient in one backward, and its first may be on its way already: "
                "use overlap=False; of torch.utils.checkpoint take use_reentrant=False"
            )
        bucket.ready.add(p)
        if bucket.is_full:
            with self._aside(waits=False):
                for handle in self._handles:
                    handle.advance()
            while self._num_started < len(self.buckets) and self.buckets[self._num_started].is_full:
                self._start(self.buckets[self._num_started])

    def _start(self, bucket: Bucket) -> None:
        assert self._comm is not None
        self._num_started += 1
        grads = []
        for p in bucket.parameters:
            grad = p.grad
            if grad is None:
                self.unused.add(p)
                p.grad = grad = torch.zeros_like(p)
            elif is_shared(grad):  # with another parameter's, or with what this backward has still to read
                p.grad = grad = grad.clone()
            grads.append(grad)
        sizes = torch.stack(norms(grads))  # one NaN or Inf is enough for a norm to be none
        if self._side is None:
            self._check(bucket, sizes)
        else:  # asking a GPU would keep the host waiting: at the end, before anyone has changed a weight
            self._sizes.append((bucket, sizes))
        with self._aside():
            self._handles.append(self._comm.iall_reduce_coalesced_(grads))

    def _check(self, bucket: Bucket, sizes: Tensor) -> None:
        if math.isfinite(sizes.sum()):
            return
        for p, size in zip(bucket.parameters, sizes, strict=True):
            # large numbers may have an infinite norm
            if not bool(size.isfinite()) and not (self._side is None and p.grad is not None and _is_finite(p.grad)):
                raise NonFiniteGradient(
                    f"{self._where}: the gradient of {self.names[p]} has a NaN or an Inf; no weight was changed. Look "
                    "at this rank's samples, lower the learning rate, or clip with max_norm"
                )

    @contextmanager
    def _aside(self, waits: bool = True) -> Iterator[None]:
        """On CUDA a stream of its own, so that the backward's goes on; it begins with what is computed already."""
        if self._side is None:
            yield
            return
        if waits:
            self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            yield


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
