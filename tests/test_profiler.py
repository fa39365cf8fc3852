"""Ranks here are plain threads: the profiler knows nothing of worlds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mplab import private
from mplab.errors import MplabError
from mplab.trace.profiler import RankProfiler, _Registration, free_stamp, split
from mplab.trace.recorder import Recorder

CPU = torch.device("cpu")


def run_ranks(profiler: RankProfiler, num_ranks: int, body: Callable[[Recorder], None]) -> None:
    """What a world does: every rank in a thread of its own, backward included."""
    start = threading.Barrier(num_ranks)

    def main(rank: int) -> None:
        recorder = Recorder(rank, CPU)
        recorder.start(recorder.now())
        recorder.profiling = True
        profiler.register(rank, recorder)
        start.wait()
        with torch.autograd.set_multithreading_enabled(False):
            body(recorder)

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def step(recorder: Recorder) -> None:
    rank = recorder.rank
    weight = torch.ones(8 + rank, 8 + rank, requires_grad=True)
    with recorder.span(f"forward of {rank}", microbatch=1):
        loss = (weight @ weight).sum()
    with recorder.span(f"backward of {rank}"):
        loss.backward()
    begin, met, end = (recorder.now() for _ in range(3))
    recorder.add("wait", "all_reduce_", begin, met)
    recorder.add("message", "all_reduce_", met, end, size_bytes=100 + rank)
    recorder.add("wait", "recv", end, recorder.now())


def profile(folder: Path, num_ranks: int = 3) -> RankProfiler:
    with RankProfiler(folder, num_ranks, [CPU] * num_ranks) as profiler:
        run_ranks(profiler, num_ranks, step)
    return profiler


def spans(path: Path) -> list[dict[str, Any]]:
    return [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]


def test_one_file_a_rank_with_its_own_work_and_nobody_elses(tmp_path: Path) -> None:
    files = profile(tmp_path / "new" / "folder").files
    assert [path.name.split(".")[0] for path in files] == ["rank0", "rank1", "rank2"]
    assert len({path.name.split(".", 1)[1] for path in files}) == 1  # one span of the plug-in
    assert sorted(path for path in (tmp_path / "new" / "folder").iterdir()) == files
    for rank, path in enumerate(files):
        names = [e["name"] for e in spans(path) if e["cat"] == "user_annotation" or "by" in e.get("args", {})]
        assert names == [f"forward of {rank} 1", f"backward of {rank}", "gloo:all_reduce", "wait: recv"]
        products = [e for e in spans(path) if e["name"] == "aten::mm"]
        assert len(products) == 3  # the product, and the gradient of each of its sides, in the rank's own thread
        assert {tuple(e["args"]["Input Dims"][0]) for e in products} == {(8 + rank, 8 + rank)}


def test_spans_lie_around_the_operators_in_them_and_messages_after(tmp_path: Path) -> None:
    for path in profile(tmp_path).files:
        of = {e["name"].split(" of ")[0]: e for e in spans(path)}
        forward, product, call = of["forward"], of["aten::matmul"], of["gloo:all_reduce"]
        assert forward["ts"] <= product["ts"]
        assert product["ts"] + product["dur"] <= forward["ts"] + forward["dur"]
        assert of["backward"]["ts"] <= call["ts"]
        assert call["ts"] + call["dur"] <= of["wait: recv"]["ts"] + 1e-3
        assert call["tid"] != forward["tid"]


def test_each_file_says_which_rank_it_is(tmp_path: Path) -> None:
    for rank, path in enumerate(profile(tmp_path).files):
        content = json.loads(path.read_text())
        assert content["distributedInfo"] == {"backend": "mplab threads", "rank": rank, "world_size": 3}
        names = {e["args"]["name"] for e in content["traceEvents"] if e["name"] == "thread_name"}
        assert names == {f"rank {rank}", f"rank {rank} messages"}
        (call,) = (e for e in spans(path) if e["name"] == "gloo:all_reduce")
        assert call["args"]["sent bytes"] == 100 + rank


def test_several_runs_in_one_profile(tmp_path: Path) -> None:
    with RankProfiler(tmp_path, 2, [CPU] * 2) as profiler:
        run_ranks(profiler, 2, step)
        run_ranks(profiler, 2, step)
    assert len(profiler.files) == 2
    for rank, path in enumerate(profiler.files):
        assert [e["name"] for e in spans(path)].count(f"forward of {rank} 1") == 2


def test_a_second_profile_leaves_the_first_ones_files(tmp_path: Path) -> None:
    first, second = profile(tmp_path, 1).files, profile(tmp_path, 1).files
    assert len(first + second) == len(set(first + second)) == len(list(tmp_path.iterdir())) == 2


def test_profiles_of_one_millisecond_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "rank3.70.pt.trace.json").touch()
    (tmp_path / "rank0.71.pt.trace.json").touch()
    assert [free_stamp(tmp_path, stamp) for stamp in (69, 70, 71)] == [69, 72, 72]


def test_the_only_rank_of_a_process_gets_what_other_threads_did(tmp_path: Path) -> None:
    with RankProfiler(tmp_path, 4, [CPU] * 4) as profiler:
        run_ranks(profiler, 1, lambda recorder: None)
        torch.ones(3).sum()
    (path,) = profiler.files
    assert "aten::sum" in [e["name"] for e in spans(path)]
    assert json.loads(path.read_text())["distributedInfo"]["world_size"] == 4


def test_what_no_rank_did_is_left_out(tmp_path: Path) -> None:
    with RankProfiler(tmp_path, 2, [CPU] * 2) as profiler:
        run_ranks(profiler, 2, step)
        torch.ones(3).cumsum(0)
    assert not [e for path in profiler.files for e in spans(path) if e["name"] == "aten::cumsum"]


def test_a_thread_that_is_another_rank_in_another_run(tmp_path: Path) -> None:
    """Threads may be used again: their events go by the time of registration."""
    with RankProfiler(tmp_path, 2, [CPU] * 2) as profiler:
        for rank in (0, 1):
            profiler.register(rank)
            torch.ones(3 + rank).cumsum(0)
    for rank, path in enumerate(profiler.files):
        sizes = [e["args"]["Input Dims"][0] for e in spans(path) if e["name"] == "aten::cumsum"]
        assert sizes == [[3 + rank]]


def test_an_error_in_the_body_comes_through_and_the_files_are_written(tmp_path: Path) -> None:
    profiler = RankProfiler(tmp_path, 2, [CPU] * 2)

    def fail() -> None:
        with profiler:
            run_ranks(profiler, 2, step)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(profiler.files) == 2
    assert all("aten::mm" in path.read_text() for path in profiler.files)


def test_an_error_in_the_body_is_not_masked_by_one_of_the_profiler(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, RankProfiler(tmp_path, 2, [CPU] * 2):
        raise ZeroDivisionError
    assert "no rank ran" in caught.value.__notes__[0]
    assert not private.is_profiler_running()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MplabError, match=r"cannot be written to .*file"), RankProfiler(tmp_path / "file", 1, [CPU]):
        pytest.fail("the body must not run")
    assert not private.is_profiler_running()


def test_a_failed_write_leaves_no_half_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Path.write_text, []

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        written.append(write(path, *args, **kwargs))
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return written[-1]

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MplabError, match="No space left"), RankProfiler(tmp_path, 2, [CPU] * 2) as profiler:
        run_ranks(profiler, 2, step)
    assert list(tmp_path.iterdir()) == []
    assert profiler.files == []


def test_no_run_in_the_body_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(MplabError, match=r"no rank ran .*world\.run"), RankProfiler(tmp_path, 1, [CPU]):
        pass


def test_a_running_profiler_is_left_alone(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as other:
        torch.ones(3).sum()
        with pytest.raises(MplabError, match="runs already"), RankProfiler(tmp_path, 1, [CPU]):
            pytest.fail("the body must not run")
    assert "aten::sum" in [e.name for e in other.events()]


def test_a_profiler_started_in_the_body_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """torch 2.13 ends the first profiler without a word and dies with a segmentation fault in its export."""

    def body(recorder: Recorder) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
            step(recorder)

    with pytest.raises(MplabError, match="another torch profiler"), RankProfiler(tmp_path, 1, [CPU]) as profiler:
        run_ranks(profiler, 1, body)
    assert not private.is_profiler_running()
    assert profile(tmp_path, 1).files  # the next one works


def test_a_profiler_left_running_in_the_body_is_an_error_too(tmp_path: Path) -> None:
    other = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)

    def run() -> None:
        with RankProfiler(tmp_path, 1, [CPU]) as profiler:
            run_ranks(profiler, 1, step)
            other.start()

    with pytest.raises(MplabError, match="another torch profiler"):
        run()
    assert profile(tmp_path, 1).files


def test_a_torch_without_the_setting_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._profiler, "_ExperimentalConfig")
    with pytest.raises(MplabError, match=r"torch 2.* cannot profile all threads"), RankProfiler(tmp_path, 1, [CPU]):
        pytest.fail("the body must not run")
    assert not private.is_profiler_running()


def test_nothing_is_printed(tmp_path: Path) -> None:
    """In a process of its own: the profiler's library looks once, at its first start, whether to be quiet."""
    code = """if True:
        import sys
        from mplab.trace.profiler import RankProfiler
        with RankProfiler(sys.argv[1], 1, []) as profiler:
            profiler.register(0)
        print(len(profiler.files))
    """
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("1\n", "")


def gpu_trace() -> dict[str, Any]:
    """What torch writes on a GPU: rank 0 in thread 70, rank 1 in thread 71, each with a launch, a kernel and a span."""
    events: list[dict[str, Any]] = []
    for rank, thread in enumerate((70, 71)):
        host, stream = {"pid": os.getpid(), "tid": thread}, {"pid": 0, "tid": 7 + 13 * rank}
        note, launch = {"External id": 10 + rank}, {"correlation": 100 + rank, "External id": 20 + rank}
        arrow = {"id": 100 + rank, "cat": "ac2g", "name": "ac2g"}
        events += [
            {"ph": "M", "name": "thread_name", **host, "args": {"name": f"thread {thread}"}},
            {"ph": "M", "name": "thread_name", **stream, "args": {"name": f"stream {stream['tid']}"}},
            {"ph": "X", "cat": "user_annotation", "name": f"span {rank}", **host, "ts": 1, "dur": 9, "args": note},
            {"ph": "X", "cat": "cuda_runtime", "name": f"launch {rank}", **host, "ts": 2, "dur": 1, "args": launch},
            {"ph": "s", **arrow, **host, "ts": 2},
            {"ph": "X", "cat": "kernel", "name": f"kernel {rank}", **stream, "ts": 5, "dur": 1, "args": launch},
            {"ph": "f", **arrow, **stream, "ts": 5, "bp": "e"},
            {
                "ph": "X",
                "cat": "gpu_user_annotation",
                "name": f"on GPU {rank}",
                **stream,
                "ts": 5,
                "dur": 1,
                "args": note,
            },
        ]
    events += [
        {"ph": "M", "name": "process_name", "pid": os.getpid(), "tid": 0, "args": {"name": "python"}},
        {
            "ph": "X",
            "cat": "kernel",
            "name": "nobody's",
            "pid": 0,
            "tid": 7,
            "ts": 8,
            "dur": 1,
            "args": {"correlation": 5},
        },
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "x", "ts": 0, "dur": 9},
    ]
    return {"schemaVersion": 1, "deviceProperties": [{"id": 0}], "baseTimeNanoseconds": 0, "traceEvents": events}


def test_kernels_go_to_the_rank_that_launched_them() -> None:
    parts = split(gpu_trace(), [_Registration(0, 70, 0, None), _Registration(0, 71, 1, None)], 2)
    for rank, part in parts.items():
        events = part["traceEvents"]
        assert [e["name"] for e in events if e["ph"] == "X"] == [
            f"span {rank}",
            f"launch {rank}",
            f"kernel {rank}",
            f"on GPU {rank}",
            "PyTorch Profiler (0)",
        ]
        assert [e["id"] for e in events if e["ph"] in "sf"] == [100 + rank] * 2
        names = {e["args"]["name"] for e in events if e["ph"] == "M"}
        assert names == {"python", f"rank {rank}", f"stream {7 + 13 * rank}"}
        assert part["deviceProperties"] == [{"id": 0}]


def test_torch_distributeds_own_records_stay_as_they_are() -> None:
    whole = {**gpu_trace(), "distributedInfo": {"backend": "gloo", "rank": 3}}
    recorder = Recorder(3, CPU)
    recorder.start(0)
    recorder.add("message", "all_reduce", 0, 1000, 4)
    (part,) = split(whole, [_Registration(0, 70, 3, recorder)], 4).values()
    assert part["distributedInfo"] == whole["distributedInfo"]
    assert not [e for e in part["traceEvents"] if e["name"] == "gloo:all_reduce"]


def test_the_plug_in_finds_ranks_views_and_bytes(tmp_path: Path) -> None:
    """With the plug-in's own reader, in this process (TensorBoard starts one for each file)."""
    loader = pytest.importorskip("torch_tb_profiler.profiler.loader")
    data = pytest.importorskip("torch_tb_profiler.profiler.data")
    generator = pytest.importorskip("torch_tb_profiler.profiler.run_generator")
    consts = pytest.importorskip("torch_tb_profiler.consts")
    run = pytest.importorskip("torch_tb_profiler.run").Run("run", str(tmp_path))
    reader = loader.RunLoader("run", str(tmp_path), None)
    with RankProfiler(tmp_path, 3, [CPU] * 3) as profiler:
        run_ranks(profiler, 3, step)
        run_ranks(profiler, 3, step)
    for path in profiler.files:
        worker, span = consts.WORKER_PATTERN.match(path.name).groups()
        parsed = data.RunProfileData.parse(worker, span[1:], str(path), str(tmp_path))
        profiled = generator.RunGenerator(worker, span, parsed).generate_run_profile()
        assert [view.display_name for view in profiled.views] == ["Overview", "Operator", "Trace"]
        assert "aten::mm" in [row["name"] for row in profiled.operation_table_by_name["data"]]
        run.add_profile(data.DistributedRunProfileData(parsed))
    assert run.workers == ["rank0", "rank1", "rank2"]
    (together,) = reader._process_spans(run)
    assert set(together.steps_to_wait["data"]) == {"all", "0"}  # every collective lies within a step
    table = together.comm_ops["data"]
    assert {worker: [row[:3] for row in rows["rows"]] for worker, rows in table.items()} == {
        f"rank{rank}": [["gloo:all_reduce", 2, 2 * (100 + rank)]] for rank in range(3)
    }
