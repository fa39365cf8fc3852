"""Runs a learner's function that needs no ranks, for a limited number of steps, and keeps what happened."""

from __future__ import annotations

import contextlib
import io
import math
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Protocol, TypeVar

from mplab.errors import CommTimeout
from mplab.homework.report import Complaint, say_error

ENDS = "every call ends"
OWN = "mplab's own is not called"
ROUNDING = 1e-9
"""Two times are equal where they differ by less than this share: the sum of floats depends on their order."""
TIMEOUT_S = 10.0  # of a call, or of all ranks together, asleep or not: what passes takes far less
INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
LIBRARIES = (str(Path(__file__).parent.parent), *INSTALLED, "<frozen ")
T = TypeVar("T")


class _Lender(Protocol):
    @property
    def borrowed(self) -> tuple[str, ...]: ...


class _Tried(Protocol):
    @property
    def error(self) -> BaseException | None: ...


TriedT = TypeVar("TriedT", bound=_Tried)


class TooManySteps(BaseException):
    """The function was stopped; no Exception, which it might catch."""


@dataclass
class Attempt:
    """One call of a solution.

    Args:
        case: what it was called with, in words.
        result: what it returned.
        error: what it raised.
        borrowed: functions of the library that do the exercise, and that it called.
        num_steps: lines, calls and returns of Python that it took, those inside libraries not counted.
    """

    case: str
    result: Any = None
    error: BaseException | None = None
    borrowed: tuple[str, ...] = ()
    num_steps: int = 0

    def __str__(self) -> str:
        return self.case


def attempt(
    case: str, call: Callable[[], object], max_steps: int, answers: Mapping[CodeType, str] | None = None
) -> Attempt:
    """Call it, and stop it after so many steps: they are counted, so that no machine is too slow to pass.

    Args:
        case: in words.
        call: what calls the learner's function.
        max_steps: see `Attempt.num_steps`.
        answers: code of the library that does the exercise, and its name.
    """
    tried = Attempt(case)
    tried.result, tried.error = outcome_of(lambda: counted(tried, call, max_steps, answers or {}, TIMEOUT_S))
    if tried.num_steps > max_steps and not isinstance(tried.error, TooManySteps):
        tried.error = TooManySteps(f"stopped after {max_steps:,} steps, and it caught that")
    return tried


def outcome_of(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What a call of a learner's function returns, or what it raises, SystemExit too; what it prints is not shown.

    Args:
        call: what calls it; after `TIMEOUT_S` it is stopped, asleep or not, and raises TooManySteps.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), _stopped_after(TIMEOUT_S):  # it runs some hundred times
            return call(), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a line of the report
        return None, error


@contextlib.contextmanager
def _stopped_after(max_s: float) -> Iterator[None]:
    """Raise TooManySteps in what runs inside, asleep or not: in the main thread, which alone hears signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(_: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not outcome_of.__code__:
            if not frame.f_code.co_filename.startswith(LIBRARIES):  # the learner's, and no world that waits for ranks
                frame.f_trace = trace
                sys.settrace(trace)  # `counted` takes it away
            frame = frame.f_back
        raise TooManySteps(f"stopped after {max_s:g} s")

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        """If it was caught, once more at the next line: in a loop, that is outside of its `try`."""
        if frame.f_code.co_filename.startswith(LIBRARIES):
            return None
        if event == "line":
            raise TooManySteps(f"stopped after {max_s:g} s, and it caught that")
        return trace

    handler = signal.signal(signal.SIGALRM, ring)
    start_s, (rest_s, _) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, max_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if rest_s:
            signal.setitimer(signal.ITIMER_REAL, max(rest_s - (time.monotonic() - start_s), 1e-3))


def until_hopeless(tries: Iterable[TriedT]) -> list[TriedT]:
    """All of them, or those up to the first that found a stub, or no end: others would only take as long."""
    made: list[TriedT] = []
    for tried in tries:
        made.append(tried)
        if isinstance(tried.error, NotImplementedError | CommTimeout | TooManySteps):
            break
    return made


def counted(
    tried: Attempt, call: Callable[[], T], max_steps: int, answers: Mapping[CodeType, str], max_s: float = math.inf
) -> T:
    """What it returns, called in this thread, while its steps and what it borrows are written down in `tried`.

    Args:
        tried: see `Attempt`.
        call: what calls the learner's function.
        max_steps: see `Attempt.num_steps`.
        answers: as in `attempt`.
        max_s: a longer call is stopped at its next step: it may spend its time asleep.

    Raises:
        TooManySteps: after `max_steps`, or `max_s`; and whatever the call raises.
    """
    end_s = time.monotonic() + max_s

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if event == "call":
            if frame.f_code in answers:
                tried.borrowed = tuple(dict.fromkeys([*tried.borrowed, answers[frame.f_code]]))
            if frame.f_code.co_filename.startswith(LIBRARIES):
                return None
        tried.num_steps += 1
        if tried.num_steps > max_steps:
            raise TooManySteps(f"stopped after {max_steps:,} steps")
        if time.monotonic() > end_s:
            raise TooManySteps(f"stopped after {max_s:g} s")
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        return call()
    finally:
        sys.settrace(before)


def error(hint_where_slow: str) -> Callable[[Attempt], Complaint | None]:
    """Whatever kept a call from its end."""

    def look(tried: Attempt) -> Complaint | None:
        if tried.error is None:
            return None
        if isinstance(tried.error, TooManySteps):
            return Complaint("an end", str(tried.error), hint_where_slow)
        seen = say_error(tried.error)
        return Complaint("no error", seen, "call it like this yourself and read the traceback")

    return look


def borrowed_by(ranks: Iterable[Attempt]) -> tuple[str, ...]:
    """What any of them borrowed, each name once."""
    return tuple(dict.fromkeys(name for rank in ranks for name in rank.borrowed))


def borrowed(tried: _Lender) -> Complaint | None:
    """A call of what the library has already."""
    hint = "write it yourself: what does the work for you has nothing to teach"
    return Complaint("lines of your own", f"a call of {', '.join(tried.borrowed)}", hint) if tried.borrowed else None


def is_written(tried: Sequence[Attempt]) -> bool:
    """Whether none of the calls found a stub."""
    return not any(isinstance(t.error, NotImplementedError) for t in tried)
