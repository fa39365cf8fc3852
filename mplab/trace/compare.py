"""A prediction over what was measured: both timelines on the same axes, and the parts of the measured time."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import Any

from mplab.errors import MplabError
from mplab.trace.figure import Band, draw_bands, draw_parts
from mplab.trace.timeline import PREDICTED_NOTE, Timeline
from mplab.trace.units import columns, format_s, signed_s

ROW_PX = 84  # of a rank, in pixels
PREDICTED, MEASURED = Band(centre=-0.22, height=0.36, is_outlined=True), Band(centre=0.21, height=0.42)


@dataclass(frozen=True, repr=False)
class Comparison:
    """One step, predicted and measured; prints as a table of the parts of its time.

    Args:
        predicted: the simulated step. Time 0 is the start of the step, here and in `measured`.
        measured: the same step as it ran, as `steps` gives it.
        causes: (name, seconds) of what makes up the predicted time, in order; what is left of the measured time is
            the part "unexplained". By default one cause, "predicted".
        title: what ran.

    Raises:
        MplabError: timelines of different numbers of ranks, or without events.
    """

    predicted: Timeline
    measured: Timeline
    causes: Sequence[tuple[str, float]] = ()
    title: str | None = None

    def __post_init__(self) -> None:
        if self.predicted.num_ranks != self.measured.num_ranks:
            raise MplabError(
                f"a prediction for {self.predicted.num_ranks} ranks and a measurement of {self.measured.num_ranks}: "
                "compare timelines of as many ranks"
            )
        if not (self.predicted.events and self.measured.events):
            raise MplabError("a timeline without events cannot be compared: run a step first")
        causes = tuple(self.causes) or (("predicted", self.predicted_s),)
        object.__setattr__(self, "causes", causes)

    @property
    def predicted_s(self) -> float:
        """The predicted step time."""
        return _end_s(self.predicted)

    @property
    def measured_s(self) -> float:
        """The measured step time."""
        return _end_s(self.measured)

    @property
    def error(self) -> float:
        """(predicted - measured) / measured: -0.05 is a prediction of 5 % less than it took."""
        return (self.predicted_s - self.measured_s) / self.measured_s

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """The causes and "unexplained"; added up in this order they are the measured time."""
        return (*self.causes, ("unexplained", self.measured_s - fsum(seconds for _, seconds in self.causes)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the two timelines cannot prove; what is true of both stands there once."""
        both = [note for note in self.measured.notes if note in self.predicted.notes]
        one = [
            f"{name}: {note}"
            for name, timeline in (("predicted", self.predicted), ("measured", self.measured))
            for note in timeline.notes
            if note not in both and note != PREDICTED_NOTE  # the figure says which is which
        ]
        return (*one, *both)

    def figure(self) -> Any:
        """A plotly figure: in every rank's row the prediction, outlined, above what was measured, filled.

        Where nothing is drawn in the prediction, the rank is predicted to wait.

        Raises:
            MplabError: plotly is not installed.
        """
        bands = [(self.predicted.events, PREDICTED), (self.measured.events, MEASURED)]
        title = f"{self._name}: predicted {format_s(self.predicted_s)}, measured {format_s(self.measured_s)}"
        return draw_bands(bands, self.measured.num_ranks, self.notes, title, ROW_PX)

    def parts_figure(self) -> Any:
        """A plotly figure: the parts, each from where the one before ends, and what they add up to.

        Raises:
            MplabError: plotly is not installed.
        """
        title = f"{self._name}: what {format_s(self.measured_s)} are made of"
        return draw_parts(self.parts, "measured", self.notes, title)

    def describe(self) -> str:
        """Both figures in words."""
        parts = ", ".join([f"{name} {signed_s(seconds)}" for name, seconds in self.parts])
        lines = [
            f"{self._name}: predicted {format_s(self.predicted_s)}, measured {format_s(self.measured_s)}: "
            f"the prediction is {self._off}.",
            f"Parts: {parts}; they add up to {format_s(self.measured_s)}.",
        ]
        for name, timeline in (("Predicted", self.predicted), ("Measured", self.measured)):
            lines.append(replace(timeline, title=name, notes=()).describe())
        return "\n".join([*lines, *(f"Note: {note.rstrip('.')}." for note in self.notes)])

    def __str__(self) -> str:
        rows = [("part", "time", "of measured")]
        rows += [(name, signed_s(seconds), self._share(seconds)) for name, seconds in self.parts]
        rows += [("measured", format_s(self.measured_s), self._share(self.measured_s))]
        both = f"predicted {format_s(self.predicted_s)}, measured {format_s(self.measured_s)}: {self._off}"
        return "\n".join([columns(rows, "lr"), both, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [*((n, signed_s(s), self._share(s)) for n, s in self.parts)]
        rows += [("measured", format_s(self.measured_s), self._share(self.measured_s))]
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{time}</td><td>{share}</td></tr>"
            for name, time, share in rows
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table><tr><th>part</th><th>time</th><th>of measured</th></tr>{cells}</table>{notes}"

    @property
    def _name(self) -> str:
        return self.title or self.measured.title or self.predicted.title or "One step"

    @property
    def _off(self) -> str:
        return f"{abs(self.error):.1%} too {'short' if self.error < 0 else 'long'}".replace("%", " %")

    def _share(self, seconds: float) -> str:
        return f"{100 * seconds / self.measured_s:.1f} %".replace("-", "−")


def steps(timeline: Timeline, name: str = "step") -> list[Timeline]:
    """The steps of a run, each as a timeline of its own whose time 0 is the step's start on the first rank to start it.

    Args:
        timeline: of a run in which every rank did each of its steps within a span `name`.
        name: of these spans; they are left out.

    Raises:
        MplabError: ranks that did different numbers of steps.
    """
    spans = [[e for e in timeline.rank(rank) if e.name == name] for rank in range(timeline.num_ranks)]
    counts = [len(of_rank) for of_rank in spans]
    if len(set(counts)) > 1:
        raise MplabError(f'the ranks have {counts} spans "{name}": every rank must do each step within one')
    rest = [[e for e in timeline.rank(rank) if e.name != name] for rank in range(timeline.num_ranks)]
    found = []
    for of_ranks in zip(*spans, strict=True):
        zero = min(span.start_s for span in of_ranks)
        events = [
            replace(e, start_s=e.start_s - zero, end_s=e.end_s - zero)
            for span, of_rank in zip(of_ranks, rest, strict=True)
            for e in of_rank
            if span.start_s <= e.start_s and e.end_s <= span.end_s
        ]
        found.append(replace(timeline, events=events))
    return found


def median_step(timelines: Sequence[Timeline]) -> Timeline:
    """Of several steps the one that took the median time; of an even number the shorter of the two in the middle."""
    return sorted(timelines, key=_end_s)[(len(timelines) - 1) // 2]


def _end_s(timeline: Timeline) -> float:
    return max(event.end_s for event in timeline.events)
