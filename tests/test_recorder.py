from __future__ import annotations

import time

import pytest
import torch

from mplab.trace.event import Event
from mplab.trace.recorder import HostSpan, Recorder

CPU = torch.device("cpu")


def test_events_count_from_the_common_zero_in_the_order_of_their_ends() -> None:
    recorder = Recorder(3, CPU)
    recorder.start(1_000)
    recorder.add("message", "send", 2_000, 5_000, size_bytes=64, microbatch=1)
    recorder.add("wait", "recv", 1_000, 9_000)
    assert recorder.events() == [
        Event(3, "message", "send", 1_000 * 1e-9, 4_000 * 1e-9, 64, 1),
        Event(3, "wait", "recv", 0.0, 8_000 * 1e-9),
    ]
    assert recorder.host_spans() == [
        HostSpan("message", "send", 2_000, 5_000, 64),
        HostSpan("wait", "recv", 1_000, 9_000, 0),
    ]


def test_a_span_is_around_what_happens_in_it() -> None:
    recorder = Recorder(0, CPU)
    recorder.start(before := time.perf_counter_ns())
    with recorder.span("step"), recorder.span("forward", microbatch=2):
        time.sleep(0.001)
    inner, outer = recorder.events()
    assert (inner.name, inner.microbatch, inner.lane) == ("forward", 2, "compute")
    assert (outer.name, outer.microbatch, outer.size_bytes) == ("step", None, 0)
    assert 0 <= outer.start_s <= inner.start_s <= inner.start_s + 0.001 <= inner.end_s <= outer.end_s
    assert outer.end_s <= (time.perf_counter_ns() - before) * 1e-9


def test_a_new_run_forgets_the_last_one() -> None:
    recorder = Recorder(0, CPU)
    recorder.start(0)
    recorder.add("wait", "recv", 1, 2)
    recorder.start(0)
    assert recorder.events() == []


def test_a_span_that_raises_is_written_down_and_remembered() -> None:
    recorder = Recorder(0, CPU)
    recorder.start(recorder.now())
    with pytest.raises(ZeroDivisionError), recorder.span("step"), recorder.span("backward", microbatch=3):
        raise ZeroDivisionError
    assert [event.name for event in recorder.events()] == ["backward", "step"]
    assert recorder.failed_in == "backward of micro-batch 3"


@pytest.mark.parametrize("profiling", [False, True])
def test_spans_are_ranges_of_torchs_profiler_while_it_runs(profiling: bool) -> None:
    recorder = Recorder(0, CPU)
    recorder.start(recorder.now())
    recorder.profiling = profiling
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.ones(2).sum()
        with recorder.span("forward", microbatch=1), recorder.span("layer"):
            torch.ones(2).sum()
    names = [event.name for event in profiler.events()]
    assert [name for name in names if name in ("forward 1", "layer")] == (["forward 1", "layer"] if profiling else [])


@pytest.mark.gpu
def test_on_a_gpu_spans_last_as_long_as_the_work_on_the_stream() -> None:
    device = torch.device("cuda", 0)
    recorder = Recorder(0, device)
    torch.cuda.synchronize()
    zero = recorder.now()
    recorder.start(zero)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        with recorder.span("sleep"):
            torch.cuda._sleep(50_000_000)  # some 30 ms; Python is back at once
        with recorder.span("nothing"):
            pass
    sleep, nothing = recorder.events()
    assert 0 <= sleep.start_s < sleep.end_s <= nothing.start_s <= nothing.end_s
    assert sleep.duration_s > 0.005 > nothing.duration_s
    assert recorder.host_spans() == []
