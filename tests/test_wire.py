"""What carries parcels: the bell that wakes a thread, and what gloo's side frees when it has been sent."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mplab.comm import gloo
from mplab.comm.bell import Bell
from mplab.comm.wire import SPARE_BYTES


def test_a_bell_rings_once_however_often_it_was_rung() -> None:
    bell = Bell()
    assert not bell.wait(0.01)
    bell.ring()
    bell.ring()
    assert bell.wait(0.01)
    assert not bell.wait(0.01)


def test_a_bell_wakes_a_thread_that_waits() -> None:
    bell = Bell()
    ringer = threading.Timer(0.02, bell.ring)
    ringer.start()
    assert bell.wait(30)
    ringer.join()


class FakeGloo:
    """Sends at once, and receives nothing until it breaks."""

    def __init__(self) -> None:
        self.is_broken = threading.Event()
        self.sent: list[weakref.ref[torch.UntypedStorage]] = []

    def isend(self, x: torch.Tensor, peer: int, tag: int) -> Any:
        self.sent.append(weakref.ref(x.untyped_storage()))
        return SimpleNamespace(wait=lambda timeout: None)

    def irecv(self, x: torch.Tensor, peer: int, tag: int) -> Any:
        return SimpleNamespace(wait=self._break)

    def _break(self, timeout: object) -> None:
        assert self.is_broken.wait(30)
        raise RuntimeError("Connection closed")


def test_what_was_sent_is_freed_sixteen_small_parcels_at_a_time_and_a_large_one_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeGloo()
    monkeypatch.setattr(gloo, "dist", fake)
    wire = gloo.GlooWire(0, 2, lambda peer, parcel: False, lambda peer, reason: None)

    def num_kept() -> int:
        """When the thread that frees has come to all that it was given."""
        has_come = Bell()
        wire._in_flight.put(has_come)
        assert has_come.wait(30)
        return sum(storage() is not None for storage in fake.sent)

    kept = []
    for number in range(17):
        wire.send([1], number)
        kept.append(num_kept())
    assert kept == [*range(1, 16), 0, 1]
    wire.send([1], "large", large := torch.ones(SPARE_BYTES, dtype=torch.uint8))
    num_kept()
    (spare,) = wire._spare._free  # to be used again
    assert spare.numel() > large.numel()
    fake.sent.clear()
    wire.send([1], "last")
    wire.flush(30)
    assert num_kept() == 0
    fake.is_broken.set()
    wire.close(30)


def test_an_interrupt_while_it_closes_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 takes a thread for ended when Ctrl-C comes while it is joined."""

    class Breakable(FakeGloo):
        def _break(self, timeout: object) -> None:
            if timeout == timedelta(milliseconds=1):
                self.is_broken.set()
            super()._break(timeout)

    monkeypatch.setattr(gloo, "dist", Breakable())
    wire = gloo.GlooWire(0, 3, lambda peer, parcel: False, lambda peer, reason: None)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        wire.close(30)
    timer.join()
    wire.close(0.0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mplab")]


def test_what_cannot_be_read_is_told_like_a_connection_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silly(FakeGloo):
        def irecv(self, x: torch.Tensor, peer: int, tag: int) -> Any:
            x.zero_()
            return SimpleNamespace(wait=lambda timeout: None)

    lost: list[tuple[int, str]] = []
    monkeypatch.setattr(gloo, "dist", Silly())
    wire = gloo.GlooWire(0, 2, lambda peer, parcel: False, lambda peer, reason: lost.append((peer, reason)))
    wire.close(30)
    ((peer, reason),) = lost
    assert (peer, "Expecting value" in reason) == (1, True)


def test_ctrl_c_between_a_frame_and_its_rest_leaves_nobody_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who got a frame waits for its rest, and would not hear of the failure."""

    class Interrupted(FakeGloo):
        def isend(self, x: torch.Tensor, peer: int, tag: int) -> Any:
            sent.append((tag, weakref.ref(x.untyped_storage())))
            if len(sent) == 1:
                raise KeyboardInterrupt
            return super().isend(x, peer, tag)

    sent: list[tuple[int, weakref.ref[torch.UntypedStorage]]] = []
    fake = Interrupted()
    monkeypatch.setattr(gloo, "dist", fake)
    wire = gloo.GlooWire(0, 2, lambda peer, parcel: False, lambda peer, reason: None)
    with pytest.raises(KeyboardInterrupt):
        wire.send([1], "large", torch.ones(5000))
    assert [tag for tag, _ in sent] == [1]  # no frame
    assert sent[0][1]() is not None  # gloo may still read it
    wire.send([1], "failure")
    assert [tag for tag, _ in sent] == [1, 0]
    fake.is_broken.set()
    wire.close(30)
