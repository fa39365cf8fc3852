"""CUDA streams played out on a CPU: which accesses are ordered by events, and which only happened to come in order.

Every rank has a stream with a vector clock. An operation that torch dispatches is one step of its rank's stream; an
event carries a clock from one stream to another. Two accesses of one element, one of them a write, must be ordered by
clocks, and memory of another stream must have been recorded (`record_stream`) by who used it. Tensors must be small:
each element counts.
"""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mplab.comm.memory
from mplab.comm import collectives, threads
from mplab.comm.memory import CudaMemory


class Stream:
    """A stream of one thread."""

    device = torch.device("cpu")

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[str, int] = {name: 0}

    def wait_event(self, event: Event) -> None:
        for name, time in event.clock.items():
            self.clock[name] = max(time, self.clock.get(name, 0))


class Event:
    """What a stream had done when it was recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.clock: dict[str, int] = {}

    def record(self) -> None:
        self.clock = dict(current().clock)

    def synchronize(self) -> None:
        """The host waits, and what it starts afterwards on its stream is later than all that."""
        current().wait_event(self)


_local = threading.local()


def current(device: Any = None) -> Stream:
    stream: Stream = _local.stream
    return stream


class FakeTorch:
    """torch, but for its streams."""

    cuda = SimpleNamespace(Event=Event, current_stream=current)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Memory:
    """Who last wrote and read each element, over all ranks."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.races: list[str] = []
        self.owner: dict[int, str] = {}
        self.used: set[tuple[int, str]] = set()
        self.recorded: set[tuple[int, str]] = set()
        self._writes: dict[tuple[int, int], tuple[str, int, str]] = {}
        self._reads: dict[tuple[int, int], dict[str, tuple[int, str]]] = {}
        self._kept: list[Any] = []  # so that no storage gets another one's address

    def access(self, x: Tensor, is_write: bool, what: str) -> None:
        stream, storage = current(), address(x)
        with self.lock:
            if storage not in self.owner:
                self.owner[storage] = stream.name
                self._kept.append(x.untyped_storage())
            self.used.add((storage, stream.name))
            now = stream.clock[stream.name]
            for element in elements(x):
                key = storage, element
                before = [self._writes[key]] if key in self._writes else []
                if is_write:
                    before += [(name, time, op) for name, (time, op) in self._reads.pop(key, {}).items()]
                    self._writes[key] = stream.name, now, what
                else:
                    self._reads.setdefault(key, {})[stream.name] = now, what
                for name, time, op in before:
                    if stream.clock.get(name, 0) < time:
                        self.races.append(f"{what} on {stream.name} is not ordered after {op} on {name}")

    def unrecorded(self) -> list[tuple[int, str]]:
        """Memory that a stream used which neither allocated nor recorded it."""
        return [(s, name) for s, name in self.used if self.owner[s] != name and (s, name) not in self.recorded]


def address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def elements(x: Tensor) -> list[int]:
    offsets = itertools.product(
        *(range(0, size * stride, stride) if stride else [0] for size, stride in zip(x.shape, x.stride(), strict=True))
    )
    return sorted({x.storage_offset() + sum(place) for place in offsets}) if x.numel() else []


class OnStream(TorchDispatchMode):
    """`with OnStream("rank 0", memory):` what this thread computes is a step of its stream."""

    def __init__(self, name: str, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        _local.stream = Stream(name)
        _local.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema, stream, name = func._schema, current(), str(func)
        stream.clock[stream.name] += 1
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        touched: list[Tensor] = []
        if not is_view and "empty" not in name:
            values = list(args) + [kwargs[a.name] for a in schema.arguments[len(args) :] if a.name in kwargs]
            names = list(schema.arguments[: len(args)]) + [a for a in schema.arguments[len(args) :] if a.name in kwargs]
            for argument, value in zip(names, values, strict=True):
                is_write = argument.alias_info is not None and argument.alias_info.is_write
                for x in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(x, Tensor):
                        touched.append(x)
                        if not (is_write and (argument.name == "out" or "fill" in name or "copy_" in name)):
                            self.memory.access(x, False, name)
            for argument, value in zip(names, values, strict=True):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    self.memory.access(value, True, name)
        results = func(*args, **kwargs)
        if not is_view:
            for x in results if isinstance(results, list | tuple) else [results]:
                if isinstance(x, Tensor) and not any(x is y for y in touched):
                    self.memory.access(x, True, name)
        return results


def record_stream(x: Tensor, stream: Stream) -> None:
    """In place of `Tensor.record_stream`."""
    memory: Memory = _local.memory
    with memory.lock:
        memory.recorded.add((address(x), stream.name))


def play_out(small_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads work as on CUDA, with these streams.

    Args:
        small_bytes: up to so many one rank computes for all.
        monkeypatch: undoes it.
    """
    monkeypatch.setattr(collectives, "SMALL_BYTES", small_bytes)
    monkeypatch.setattr(threads, "HostMemory", lambda: CudaMemory(torch.device("cpu")))
    monkeypatch.setattr(mplab.comm.memory, "torch", FakeTorch())
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
