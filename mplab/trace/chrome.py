"""A timeline as a Chrome trace: one JSON file that Perfetto and chrome://tracing open, and that can be read back."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from os import PathLike
from typing import Any

from mplab.errors import MplabError
from mplab.trace.event import LANES, Event

_WRITER = "mplab timeline 1"
_PID = 1  # both viewers take process and thread 0 for the idle one


def save(
    path: str | PathLike[str], events: Sequence[Event], num_ranks: int, notes: Sequence[str], title: str | None
) -> None:
    """Write the trace; a reader never sees half of it."""
    trace: list[dict[str, Any]] = [_meta("process_name", 0, {"name": title or "mplab"})]
    for rank, in_tracks in enumerate(_tracks(events, num_ranks)):
        for track, in_track in enumerate(in_tracks):
            thread = 1 + rank + num_ranks * track
            trace += [
                _meta("thread_name", thread, {"name": f"rank {rank}" + (f", overlapping {track}" if track else "")}),
                _meta("thread_sort_index", thread, {"sort_index": rank * (len(events) + 1) + track}),
                *(_span(event, thread) for event in in_track),
            ]
    told = {"writer": _WRITER, "num_ranks": num_ranks, "notes": list(notes), "title": title}
    text = json.dumps({"displayTimeUnit": "ns", "otherData": told, "traceEvents": trace}, separators=(",", ":"))
    part = f"{os.fspath(path)}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except OSError as error:
        raise MplabError(f"the timeline cannot be written to {os.fspath(path)}: {error.strerror}.") from None


def load(path: str | PathLike[str]) -> tuple[list[Event], int, tuple[str, ...], str | None]:
    """Events, number of ranks, notes and title of a file that `save` wrote."""
    where = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise MplabError(f"the timeline {where} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise MplabError(
            f"{where} is damaged, or no timeline: {error}. Timeline.save writes what can be read."
        ) from None
    told = content.get("otherData") if isinstance(content, dict) else None
    if not isinstance(told, dict) or told.get("writer") != _WRITER:
        raise MplabError(f"{where} was not written by Timeline.save ({_WRITER}): only such a file can be read back.")
    number = 0
    try:
        events = []
        for number, span in enumerate(content["traceEvents"]):  # noqa: B007 (the error says which)
            if span["ph"] == "X":
                events.append(_event(span))
        return events, int(told["num_ranks"]), tuple(map(str, told["notes"])), told["title"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MplabError(f"{where} is damaged at trace event {number}: {type(error).__name__} {error}.") from None


def _tracks(events: Sequence[Event], num_ranks: int) -> list[list[list[Event]]]:
    """Each rank's events in tracks where any two are apart or one within the other: viewers draw nothing else."""
    tracks: list[list[list[Event]]] = [[[]] for _ in range(num_ranks)]
    open_until: dict[tuple[int, int], list[int]] = defaultdict(list)  # ends, from the outermost to the innermost
    for event in sorted(events, key=lambda e: (_ns(e.start_s), -_ns(e.end_s), LANES.index(e.lane))):
        for track in range(len(tracks[event.rank]) + 1):
            ends = open_until[event.rank, track]
            while ends and ends[-1] <= _ns(event.start_s):
                ends.pop()
            if not ends or _ns(event.end_s) <= ends[-1]:
                break
        ends.append(_ns(event.end_s))
        if track == len(tracks[event.rank]):
            tracks[event.rank].append([])
        tracks[event.rank][track].append(event)
    return tracks


def _span(event: Event, thread: int) -> dict[str, Any]:
    args = {"rank": event.rank, "bytes": event.size_bytes}
    if event.microbatch is not None:
        args["microbatch"] = event.microbatch
    start, end = _ns(event.start_s), _ns(event.end_s)
    where = {"ph": "X", "pid": _PID, "tid": thread, "ts": start / 1000, "dur": (end - start) / 1000}
    return where | {"cat": event.lane, "name": event.name, "args": args}


def _event(span: dict[str, Any]) -> Event:
    args, start = span["args"], round(span["ts"] * 1000)
    end = start + round(span["dur"] * 1000)
    microbatch = args.get("microbatch")
    return Event(
        int(args["rank"]),
        span["cat"],
        str(span["name"]),
        start * 1e-9,
        end * 1e-9,
        int(args["bytes"]),
        microbatch if microbatch is None else int(microbatch),
    )


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _meta(what: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": _PID, "tid": thread, "name": what, "args": args}
