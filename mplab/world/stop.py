"""How rank threads end when their run has failed: by an exception at their next line, or left behind and named."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mplab.comm.hub import Hub
from mplab.errors import PeerFailure

# A stopped rank gets this long to leave a computation before it is left behind (and named in the error).
GRACE_S = 0.9
# One that imports a module may go on with it for this long: interrupted, it is broken for the whole process.
IMPORT_S = 10.0


class _Stopped(PeerFailure):
    """Raised in a rank that computes when the run has failed; the interpreter makes it, without arguments."""

    def __init__(self) -> None:
        super().__init__("stopped while it computed, because the run has failed")


_quiet_lock = threading.Lock()  # several worlds may fail at once
_num_quiet, _hook = 0, sys.unraisablehook


@contextmanager
def _losing_quietly() -> Iterator[None]:
    """Where Python frees objects it loses an exception, and says so; nobody need read of a stop, for another comes."""
    global _num_quiet, _hook
    with _quiet_lock:
        if _num_quiet == 0:
            _hook, sys.unraisablehook = sys.unraisablehook, _lose
        _num_quiet += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _num_quiet -= 1
            if _num_quiet == 0:
                sys.unraisablehook = _hook


def _lose(lost: sys.UnraisableHookArgs) -> None:
    if lost.exc_type is not _Stopped:
        _hook(lost)


@_losing_quietly()
def stop(threads: list[threading.Thread], hub: Hub) -> None:
    """Let stopped ranks leave: those that wait are awake, those that compute get an exception at their next line."""
    _join(threads, 0.02)
    hub.wake()  # who failed it may have been stopped before all were awake
    now = time.monotonic()
    end, last = now + GRACE_S, now + IMPORT_S
    while (alive := [t for t in threads if t.is_alive()]) and (now := time.monotonic()) < end:
        importing = [t for t in alive if _imports(t)]
        for rank, thread in enumerate(threads):
            if thread in alive and thread not in importing:
                with hub.lock:  # it does not end meanwhile, and no other thread begins under its number
                    ident = hub.threads[rank] or 0
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_Stopped))
        if importing:
            end = min(now + GRACE_S, last)
        _join(alive, min(0.02 if importing else 0.3, end - now))  # and once more for those that caught it
    for rank, thread in enumerate(threads):
        if thread.is_alive() and hub.failure is not None:
            at = hub.line_of(rank)
            hub.failure.add_note(f"rank {rank} did not stop in time: it is left behind at {at}")
    if sys.version_info < (3, 12) and (alive := [thread for thread in threads if thread.is_alive()]):
        _take_back(alive)


def _take_back(threads: list[threading.Thread]) -> None:
    """Forget the exceptions that they have not met: while one waits, Python 3.11 never ends a call that is traced.

    So nothing that counts steps would end any more, nor a debugger. Those left behind then end where they next say
    something to the others.
    """
    send = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for thread in threads:
        send(ctypes.c_ulong(thread.ident or 0), None)
    with suppress(_Stopped):  # the interpreter looks for them until one has arrived
        send(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(_Stopped))
        time.sleep(0)


def _imports(thread: threading.Thread) -> bool:
    """Whether a module is being imported in it."""
    frame = sys._current_frames().get(thread.ident or -1)
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _join(threads: list[threading.Thread], seconds: float) -> None:
    """Wait for all together; Ctrl-C may have come before all were started."""
    end = time.monotonic() + seconds
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, end - time.monotonic()))
