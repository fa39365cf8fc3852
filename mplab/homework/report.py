"""What a check tells: line by line, what was expected, what was seen, and a hint."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch

import mplab
from mplab.errors import CommError

Outcome = Literal["passed", "failed", "not checked"]
T = TypeVar("T")

# Where no line is the learner's: this library, what is installed beside torch, and Python's own modules.
_HERE, _TORCH, _PYTHON = (str(Path(path).parent) + os.sep for path in (mplab.__file__, torch.__path__[0], os.__file__))


class Complaint(NamedTuple):
    """What is wrong in one trial."""

    expected: str
    seen: str
    hint: str


@dataclass(frozen=True)
class Line:
    """One check of an exercise.

    Args:
        name: what was checked.
        outcome: "passed", "failed", or "not checked" where an earlier failure left nothing to look at.
        case: where it failed: the smallest case that was tried and does.
        expected: what should have been seen there; after a pass, what was seen everywhere.
        seen: what was.
        hint: what to look at first.
    """

    name: str
    outcome: Outcome = "passed"
    case: str = ""
    expected: str = ""
    seen: str = ""
    hint: str = ""


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a check; prints as a list.

    Args:
        exercise: the function's name.
        lines: one for every check, in the order in which to mend them.
        is_written: False while the stub still raises NotImplementedError.
    """

    exercise: str
    lines: tuple[Line, ...]
    is_written: bool = True

    @property
    def passed(self) -> bool:
        """Whether everything was checked and nothing failed."""
        return self.is_written and all(line.outcome == "passed" for line in self.lines)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(line.name for line in self.lines if line.outcome == "failed")

    def __str__(self) -> str:
        if not self.is_written:
            return f"{self.exercise}: not written yet. Write it in the cell above, run that cell, then this one again."
        return "\n".join(self._text())

    __repr__ = __str__

    def _text(self) -> Iterator[str]:
        num_passed = sum(line.outcome == "passed" for line in self.lines)
        yield f"{self.exercise}: {num_passed} of {len(self.lines)} checks passed"
        for line in self.lines:
            mark = {"passed": "ok", "failed": "FAILED", "not checked": "?"}[line.outcome]
            extra = f" ({line.expected})" if line.outcome == "passed" and line.expected else ""
            yield f"  {mark:<8}{line.name}{extra}"
            if line.outcome == "failed":
                for key in ("case", "expected", "seen", "hint"):
                    if text := getattr(line, key):
                        yield f"            {key + ':':<10}" + text.replace("\n", "\n" + " " * 22)
        if any(line.outcome == "not checked" for line in self.lines):
            yield "  (?: not checked; mend what failed first)"


def say_error(error: BaseException) -> str:
    """An error, and the learner's own line in which it came about, where its text does not say that."""
    said = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)
    called = dropwhile(lambda frame: not frame.filename.startswith(_HERE), frames)  # before that: who called the check
    lines = [frame.line for frame in called if not frame.filename.startswith((_HERE, _TORCH, _PYTHON))]
    return f"{said}\nin: {lines[-1]}" if lines and lines[-1] and not isinstance(error, CommError) else said


def check_all(name: str, trials: Sequence[T], look: Callable[[T], Complaint | None], said: str = "") -> Line:
    """The first trial with a complaint; trials come in the order of their size, and print as their case."""
    for trial in trials:
        if (complaint := look(trial)) is not None:
            return Line(name, "failed", str(trial), *complaint)
    return Line(name, "passed", expected=said) if trials else Line(name, "not checked")
