"""A process that ends with the one that started it: a launcher that is killed can end nobody any more."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

# Whose child this process is from the start: a process whose parent has ended gets another one.
_PARENT = os.getppid()
_PR_SET_PDEATHSIG = 1
LOOK_EVERY_S = 0.5

_watches = False


def end_with_parent() -> None:
    """From now on this process is killed when its parent ends, whatever it does then; to be called by its main thread.

    Only for one whose parent waits for it until the end, as torchrun does: a shell may go away and leave it running. On
    Linux the system does it, when the parent's thread ends that started this process; elsewhere a thread looks.
    """
    global _watches
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    elif not _watches:
        threading.Thread(target=_watch, daemon=True, name="mplab-parent").start()
        _watches = True
    if os.getppid() != _PARENT:  # before the call, and the system tells of such an end no more
        _end()


def _watch() -> None:
    while os.getppid() == _PARENT:
        time.sleep(LOOK_EVERY_S)
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
