"""torch's profiler over all ranks of a process: one trace file a rank, for TensorBoard's PyTorch Profiler plug-in.

torch writes one trace for the whole process. Here it is cut by what each rank's thread ran and launched, and what the
rank sent and waited for gets a row of its own. The plug-in (torch-tb-profiler) reads files that are called
`<worker>.<milliseconds>.pt.trace.json`.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from mplab import private
from mplab.errors import MplabError
from mplab.trace.recorder import Recorder

JsonObject = dict[str, Any]

# The plug-in's Distributed view shows collectives of these names alone, and only as NCCL's or gloo's.
_PLUGIN_COLLECTIVES = ("broadcast", "reduce", "all_reduce", "all_gather", "reduce_scatter")
_PLUGIN_PREFIX = "gloo:"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cuda_sync")
_MESSAGE_THREAD = 10_000_000  # + rank: more than any thread id of the system
_MESSAGE_ID = 1 << 40  # + number: more than any id that torch gives


class _Registration(NamedTuple):
    since_ns: int  # time.time_ns
    thread: int
    rank: int
    recorder: Recorder | None


_ENDED = "another torch profiler was started while ranks were profiled, which ended this one: use one."


class RankProfiler:
    """`with RankProfiler(logdir, num_ranks, devices) as p:` profiles the ranks that register in the body.

    Args:
        logdir: folder for the trace files; made if there is none.
        num_ranks: ranks of the world.
        devices: where they compute; CUDA kernels are recorded if one is a GPU.

    `p.files` has the paths afterwards, in rank order. Recorded are operators with their input shapes, spans, kernels,
    and on a CPU messages and waits. Memory is not: torch reports it to the calling thread's profiler alone.

    Raises:
        MplabError: the folder cannot be written, another torch profiler runs, or this torch records one thread only.
    """

    def __init__(self, logdir: str | os.PathLike[str], num_ranks: int, devices: Sequence[torch.device]) -> None:
        self.files: list[Path] = []
        self._folder, self._num_ranks = Path(logdir), num_ranks
        self._on_cuda = any(device.type == "cuda" for device in devices)
        self._registered: list[_Registration] = []

    def register(self, rank: int, recorder: Recorder | None = None) -> None:
        """Called in the rank's own thread at the start of every run: what this thread does from now on is that rank's.

        Args:
            rank: its index.
            recorder: its messages and waits go into the rank's file too.
        """
        self._registered.append(_Registration(time.time_ns(), threading.get_native_id(), rank, recorder))

    def __enter__(self) -> RankProfiler:
        self._check_folder()
        config = private.all_threads_config()
        if config is None:
            raise MplabError(
                f"torch {torch.__version__} cannot profile all threads, and ranks are threads: use torch 2.11 to 2.13, "
                "or look at world.timeline, which needs no profiler."
            )
        if private.is_profiler_running():
            raise MplabError(
                "a torch profiler runs already, and torch has one a process: leave it before you profile ranks."
            )
        private.quiet_kineto()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            record_shapes=True,
            acc_events=True,  # there is one cycle only; without it torch 2.11 warns that a second would lose the first
            experimental_config=config,
        )
        self._profiler.__enter__()
        self._entered_ns = time.time_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self._profiler.__exit__(None, None, None)
            except RuntimeError:  # torch 2.11 says so here, later ones say nothing and lose the trace
                raise MplabError(_ENDED) from None
            self._write()
        except Exception as own:
            if error is None:
                raise
            error.add_note(f"(the profile of this run was not written: {own})")  # never instead of what went wrong

    def _check_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise MplabError(
                f"profiles cannot be written to {self._folder}: {error.strerror}; give another folder."
            ) from None

    def _write(self) -> None:
        began_ns = private.trace_start_ns(self._profiler)
        if began_ns is not None and not 0 < began_ns <= self._entered_ns:
            raise MplabError(_ENDED)
        if not self._registered:
            raise MplabError("no rank ran while the profiler did: call world.run inside `with world.profile(...)`.")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            self._profiler.export_chrome_trace(path)
            with open(path, encoding="utf-8", errors="replace") as file:
                whole = json.load(file, strict=False)
        stamp = free_stamp(self._folder, time.time_ns() // 1_000_000)
        texts = {rank: json.dumps(part) for rank, part in split(whole, self._registered, self._num_ranks).items()}
        files = {rank: self._folder / f"rank{rank}.{stamp}.pt.trace.json" for rank in texts}
        try:
            for rank, file_path in files.items():
                file_path.write_text(texts[rank], encoding="utf-8")
        except OSError as error:
            for file_path in files.values():
                file_path.unlink(missing_ok=True)
            raise MplabError(f"the profile cannot be written to {self._folder}: {error.strerror}.") from None
        self.files = list(files.values())


def free_stamp(folder: Path, stamp: int) -> int:
    """The first number from `stamp` on that no profile in the folder has: the plug-in takes equal ones for one."""
    while any(folder.glob(f"*.{stamp}.pt.trace.json")):
        stamp += 1
    return stamp


def split(whole: JsonObject, registered: Sequence[_Registration], num_ranks: int) -> dict[int, JsonObject]:
    """Cut the trace of a process in traces of its ranks.

    What a thread did belongs to the rank that had registered in it last; what ran on a GPU, to the one that launched
    it. The only rank of a process gets everything.
    """
    ranks = sorted({r.rank for r in registered})
    parts: dict[int, list[JsonObject]] = {rank: [] for rank in ranks}
    owner = _Owner(whole, registered)
    names = []
    for event in whole["traceEvents"]:
        if event.get("ph") == "M":
            names.append(event)
        elif len(ranks) == 1 or isinstance(event.get("pid"), str):  # the profiler's own rows have a name for a process
            for part in parts.values():
                part.append(event)
        elif (rank := owner.of(event)) is not None:
            parts[rank].append(event)
    told = {key: value for key, value in whole.items() if key not in ("traceEvents", "traceName")}
    result = {}
    for rank, part in parts.items():
        rows = {(e.get("pid"), e.get("tid")) for e in part}
        threads = {r.thread for r in registered if r.rank == rank}
        # torch names most threads, not all.
        part += [n for n in names if n["tid"] not in threads and ((n["pid"], n["tid"]) in rows or n["tid"] == 0)]
        part += [_thread_name(thread, f"rank {rank}") for thread in sorted(threads)]
        if "distributedInfo" not in whole:  # else torch.distributed has recorded its collectives itself
            part += _messages(whole, [r.recorder for r in registered if r.rank == rank], rank)
            told["distributedInfo"] = {"backend": "mplab threads", "rank": rank, "world_size": num_ranks}
        result[rank] = {**told, "traceName": f"rank{rank}", "traceEvents": part}
    return result


class _Owner:
    """Which rank an event belongs to."""

    def __init__(self, whole: JsonObject, registered: Sequence[_Registration]) -> None:
        self._base_ns = int(whole.get("baseTimeNanoseconds", 0))
        self._since: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for registration in sorted(registered, key=lambda r: r.since_ns):
            self._since[registration.thread].append((registration.since_ns, registration.rank))
        self._by_correlation: dict[int, int | None] = {}
        self._by_external_id: dict[int, int | None] = {}
        for event in whole["traceEvents"]:
            args = event.get("args", {})
            if event.get("ph") == "X" and event.get("cat") not in _ON_GPU:
                rank = self._of_thread(event)
                if "correlation" in args:
                    self._by_correlation[args["correlation"]] = rank
                elif "External id" in args:
                    self._by_external_id[args["External id"]] = rank

    def of(self, event: JsonObject) -> int | None:
        """The rank, or None for what no rank did."""
        args = event.get("args", {})
        if event.get("cat") == "ac2g":  # an arrow from a launch to its kernel
            return self._by_correlation.get(event["id"])
        if event.get("cat") in _ON_GPU:
            by_external_id = self._by_external_id.get(args.get("External id"))
            return self._by_correlation.get(args.get("correlation"), by_external_id)
        return self._of_thread(event)

    def _of_thread(self, event: JsonObject) -> int | None:
        since = self._since.get(event.get("tid", -1))
        if since is None:
            return None
        number = bisect(since, self._base_ns + int(event["ts"] * 1000), key=lambda entry: entry[0])
        return since[max(number - 1, 0)][1]


def _messages(whole: JsonObject, recorders: Sequence[Recorder | None], rank: int) -> list[JsonObject]:
    """The rank's messages and waits as rows of the trace; a collective's wait and message are one event, its call."""
    to_unix_ns = time.time_ns() - time.perf_counter_ns()
    spans = [s for r in dict.fromkeys(recorders) if r is not None for s in r.host_spans() if s.lane != "compute"]
    events = [_thread_name(_MESSAGE_THREAD + rank, f"rank {rank} messages")]
    waiting = None
    for number, span in enumerate(spans):
        name, start_ns = span.name.rstrip("_"), span.start_ns
        if waiting is not None and span.lane == "message" and (waiting.name, waiting.end_ns) == (span.name, start_ns):
            events.pop()
            start_ns = waiting.start_ns
        waiting = span if span.lane == "wait" else None
        is_shown = span.lane == "message" and name in _PLUGIN_COLLECTIVES
        events.append(
            {
                "ph": "X",
                "cat": "cpu_op" if is_shown else "mplab",  # what the plug-in does not know is no CPU time for it
                "name": f"{_PLUGIN_PREFIX}{name}" if is_shown else f"{span.lane}: {name}",
                "pid": os.getpid(),
                "tid": _MESSAGE_THREAD + rank,
                "ts": (start_ns + to_unix_ns - int(whole.get("baseTimeNanoseconds", 0))) / 1000,
                "dur": (span.end_ns - start_ns) / 1000,
                "args": {
                    "External id": _MESSAGE_ID + number,
                    "Input Dims": [[span.size_bytes]],
                    "Input type": ["unsigned char"],
                    "sent bytes": span.size_bytes,
                    "by": "mplab",
                },
            }
        )
    return events if len(events) > 1 else []


def _thread_name(thread: int, name: str) -> JsonObject:
    return {"ph": "M", "name": "thread_name", "pid": os.getpid(), "tid": thread, "args": {"name": name}}
