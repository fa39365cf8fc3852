"""What tests of exercises' checks share: right solutions pass, and each wrong one fails at the lines that say why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest

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


def check_fails(check: Callable[[Any], Report], solution: Any, reasons: Mapping[str, str]) -> None:
    report = check(solution)
    assert list(report.failed) == list(reasons), str(report)
    for line, words in reasons.items():
        found = lines_of(report)[line]
        assert all([found.case, found.expected, found.seen, found.hint]), found
        assert words in f"{found.seen} {found.hint}", found


def wrong_ones(wrong: Wrong) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("solution", "reasons"), wrong, ids=[name(solution) for solution, _ in wrong])
