"""How much memory tensors take while a block runs: what a prediction of memory is held against."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from mplab import private
from mplab.errors import MplabError


class LiveBytes:
    """`with LiveBytes() as live:` counts the bytes of the tensors made inside, as long as anything keeps them.

    On a CPU it looks after every op of this thread, its backward's too: in a rank it counts that rank. A storage counts
    once, however many tensors share it, and with its present size (`untyped_storage().resize_`). Memory that a kernel
    takes and frees again is not seen. On CUDA the allocator answers, for all ranks of that GPU together.

    Of collectives up to 1 MiB one thread rank computes the results of all, and they count as its own: the memory of a
    rank alone is told where tensors are larger.

    Args:
        known: tensors that were there before and count too, such as a model's weights.
        device: whose memory.

    Raises:
        MplabError: a device whose memory can't be counted, or a torch that can't show its ops.
    """

    def __init__(self, known: Iterable[Tensor] = (), device: torch.device | str = "cpu") -> None:
        self._device, self._stack = torch.device(device), ExitStack()
        if self._device.type not in ("cpu", "cuda"):
            raise MplabError(f'LiveBytes(device={device!r}): memory is counted on "cpu" and "cuda"')
        self._seeing = private.seeing_ops(self._see) if self._device.type == "cpu" else None
        if self._device.type == "cpu" and self._seeing is None:
            raise MplabError(
                f"LiveBytes needs to see every op, and torch {torch.__version__} has no TorchDispatchMode: "
                "take a torch from 2.11 to 2.13"
            )
        self._peak_bytes = self._base_bytes = 0
        self._is_open = False
        self._storages: dict[int, weakref.ref[UntypedStorage]] = {}
        for x in known:
            self._add(x)
        self._known_bytes = self._sum_bytes()

    def __enter__(self) -> LiveBytes:
        self._is_open = True
        if self._device.type == "cuda":
            self._base_bytes = torch.cuda.memory_allocated(self._device) - self._known_bytes
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        assert self._seeing is not None
        self._stack.enter_context(self._seeing)
        self._peak_bytes = self.now_bytes
        return self

    def __exit__(self, *exception: object) -> None:
        self._peak_bytes = self.peak_bytes
        self._is_open = False
        self._stack.close()

    @property
    def now_bytes(self) -> int:
        """Bytes of the tensors that are alive now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._base_bytes
        return self._sum_bytes()

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once so far: on a CPU after an op, on CUDA at any time."""
        if self._device.type == "cuda" and self._is_open:
            return max(self._peak_bytes, torch.cuda.max_memory_allocated(self._device) - self._base_bytes)
        return self._peak_bytes

    def restart(self) -> None:
        """Forget the peak: from now on it is the most from now on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._peak_bytes = self.now_bytes

    def _see(self, op: Any, arguments: Any, result: Any) -> None:
        """Count what an op made: what it hands on of its arguments may be another thread's."""
        is_handed_on = op is not torch.ops.aten.lift_fresh.default  # that is how torch.tensor gives its result
        given = {id(x.untyped_storage()) for x in _tensors(arguments)} if is_handed_on else set()
        for x in _tensors(result):
            if id(x.untyped_storage()) not in given:
                self._add(x)
        self._peak_bytes = max(self._peak_bytes, self._sum_bytes())

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if storage.device.type == self._device.type and (known is None or known() is not storage):
            self._storages[key] = weakref.ref(storage)

    def _sum_bytes(self) -> int:
        size_bytes = 0
        for key, ref in list(self._storages.items()):
            storage = ref()
            if storage is None:
                self._storages.pop(key, None)
            else:
                size_bytes += storage.nbytes()
        return size_bytes


def _tensors(xs: Any) -> Iterator[Tensor]:
    """The dense tensors in an op's arguments or results."""
    if isinstance(xs, Tensor):
        if xs.layout == torch.strided:
            yield xs
    elif isinstance(xs, tuple | list):
        for x in xs:
            yield from _tensors(x)
    elif isinstance(xs, dict):
        yield from _tensors(tuple(xs.values()))
