"""What tests of exercises' checks share: right solutions pass, and each wrong one fails at the lines that say why."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mplab.__main__ import main as command_line
from mplab.homework import Line, Report

Wrong = list[tuple[Any, dict[str, str]]]
"""Solutions, the lines that each fails at, and a part of what these say: of the hint, or of what was seen."""


def name(solution: Any) -> str:
    """A function's, and those of what it was given."""
    if isinstance(solution, partial):
        return "-".join([name(solution.func), *(name(value) for value in solution.keywords.values())])
    return str(getattr(solution, "__name__", solution))


def lines_of(report: Report) -> dict[str, Line]:
    return {line.name: line for line in report.lines}


def check_passes(check: Callable[[Any], Report], solution: Any) -> Report:
    report = check(solution)
    assert report.passed, str(report)
    return report


def check_fails_at(check: Callable[[Any], Report], solution: Any, names: Iterable[str]) -> Report:
    report = check(solution)
    assert list(report.failed) == list(names), str(report)
    assert not report.passed
    for line in report.lines:
        if line.outcome == "failed":
            assert all([line.case, line.expected, line.seen, line.hint]), line
    return report


def check_fails(check: Callable[[Any], Report], solution: Any, reasons: Mapping[str, str]) -> None:
    found = lines_of(check_fails_at(check, solution, reasons))
    for line, words in reasons.items():
        assert words in f"{found[line].seen} {found[line].hint}", found[line]


def wrong_ones(wrong: Wrong) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("solution", "reasons"), wrong, ids=[name(solution) for solution, _ in wrong])


def the_failed(report: Report) -> Line:
    (name,) = report.failed
    return lines_of(report)[name]


def stub(*_: Any) -> Any:
    raise NotImplementedError


def generating_stub(*_: Any) -> Iterator[Any]:
    raise NotImplementedError
    yield


def never_ends(*_: Any) -> Any:
    while True:
        pass


def sleeps(*_: Any) -> Any:
    while True:
        time.sleep(0.01)


def leaves(*_: Any) -> None:
    raise SystemExit("enough")


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    assert all(p.grad is not None for p in parameters)
    return [p.grad for p in parameters if p.grad is not None]


def row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def check_stub(check: Callable[[Any], Report]) -> None:
    report = check(stub)
    assert (report.passed, report.is_written, report.failed) == (False, False, ())
    assert str(report).startswith(check.__name__.removeprefix("check_") + ": not written yet")
    assert "\n" not in str(report)


def check_sleep(check: Callable[[Any], Report], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solution that sleeps for ever is stopped, and reported in this line."""
    for module in ("limited", "watched"):  # of calls without ranks; of a rank's
        monkeypatch.setattr(f"mplab.homework.{module}.TIMEOUT_S", 0.2)
    found = the_failed(check(sleeps))
    assert found.name == line
    assert "stopped after 0.2 s" in found.seen
    assert "loop" in found.hint


def check_command(code: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of wrong functions in a file, each of an exercise's name."""
    (folder / "wrong.py").write_text(code)
    for exercise in re.findall(r"^def (\w+)", code, re.MULTILINE):
        assert command_line(["check", exercise, str(folder / "wrong.py")]) == 1
        out = capsys.readouterr().out
        assert out.startswith(f"{exercise}: ")
        assert "FAILED" in out
