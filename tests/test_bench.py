"""The form of the benchmarks: rows, rounds, percentiles, one JSON object, nothing left running. No time is judged."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import SUBPROCESS
from test_children import is_running

import mplab.bench.all_reduce
import mplab.bench.world
from mplab import MplabError
from mplab.bench import BENCHMARKS, all_reduce, main
from mplab.bench.common import Row, compare, format_bytes, paired, skipped, table
from mplab.world import children
from mplab.world.children import GlooProcesses

KEYS = {"case", "peer", "ratio", "low", "high", "runs"}
MACHINE_KEYS = {"cpu", "num_cores", "memory_bytes", "gpus", "torch", "python", "system", "load"}


# -- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_is_the_median_of_ratios_with_its_spread() -> None:
    ours, peers = [1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0, 64.0, 81.0, 100.0, 121.0], list(map(float, range(1, 12)))
    row = compare("2 ranks", "gloo", ours, peers, bytes_s=7.0)
    assert (row.ratio, row.low, row.high, row.runs) == (6.0, 2.0, 10.0, 11)  # the ratios are 1 to 11
    assert row.extra == {"ours_s": 36.0, "peer_s": 6.0, "bytes_s": 7.0}
    # Each round against its own: this is not the ratio of the medians.
    drifting = compare("", "", [1.0, 10.0, 100.0], [2.0, 40.0, 800.0])
    assert (drifting.ratio, drifting.low, drifting.high) == pytest.approx((0.25, 0.15, 0.45))
    assert compare("", "", [1.0], [2.0]).low == compare("", "", [1.0], [2.0]).high == 0.5


def test_sides_that_did_not_run_in_the_same_rounds_are_no_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare("", "", [1.0], [1.0, 2.0])


def test_the_form_of_a_row() -> None:
    values = compare("2 ranks, 64 KB", "gloo", [1.0], [2.0], bytes_s=3.0).to_dict()
    assert list(values)[:6] == ["case", "peer", "ratio", "low", "high", "runs"]
    assert values.keys() - KEYS == {"ours_s", "peer_s", "bytes_s"}
    nothing = skipped("2 ranks", "notebook_launcher", "accelerate is not installed").to_dict()
    assert nothing.keys() - KEYS == {"note"}
    assert nothing["ratio"] is nothing["low"] is nothing["high"] is None
    assert nothing["runs"] == 0


def test_rounds_take_turns() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return len(order)

    ours, gloo, copy = paired(lambda: side("a"), lambda: side("b"), lambda: side("c"), num_rounds=3)
    assert "".join(order) == "abccbaabc"
    assert (ours, gloo, copy) == ([1, 6, 7], [2, 5, 8], [3, 4, 9])


def test_a_table_has_units_and_every_column() -> None:
    rows = [compare("2 ranks", "gloo", [1e-3], [2e-3], bytes_s=3e9), skipped("4 ranks", "x", "not here")]
    head, first, second = table(rows).splitlines()
    assert " ".join(head.split()) == "case peer ratio 10 % 90 % runs ours_s peer_s bytes_s note"
    assert all(part in first for part in ("0.5", "1.00 ms", "2.00 ms", "3.00 GB/s"))
    assert second.split() == ["4", "ranks", "x", "0", "not", "here"]
    assert first.index("3.00 GB/s") == head.index("bytes_s")


@pytest.mark.parametrize(
    ("size", "text"), [(1 << 10, "1 KB"), (1 << 16, "64 KB"), (1 << 26, "64 MB"), (1000, "1000 B"), (1 << 30, "1 GB")]
)
def test_sizes_as_they_are_called(size: int, text: str) -> None:
    assert format_bytes(size) == text


# -- the command ----------------------------------------------------------------------------------------------------


def test_json_is_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [compare("2 ranks, 64 KB", "gloo", [1.0], [2.0]), skipped("2 ranks", "x", "not here")]
    monkeypatch.setattr(all_reduce, "run", lambda: rows)
    assert main(["all_reduce", "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report.keys() == {"bench", "machine", "rows"}
    assert report["bench"] == "all_reduce"
    assert report["machine"].keys() == MACHINE_KEYS
    assert report["rows"] == [row.to_dict() for row in rows]
    assert main(["all_reduce"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(table(rows))
    assert "beside gloo's" in printed
    assert f"torch {torch.__version__}" in printed


def test_every_benchmark_says_what_it_times() -> None:
    for name in BENCHMARKS:
        module = importlib.import_module(f"mplab.bench.{name}")
        assert callable(module.run)
        assert len(module.__doc__.splitlines()) > 1


def test_a_benchmark_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["juggling"])
    assert caught.value.code == 2
    assert "all_reduce" in capsys.readouterr().err


# -- all_reduce -----------------------------------------------------------------------------------------------------


def test_a_call_lasts_from_last_to_last() -> None:
    rank_0, rank_1 = [0, 10_000, 20_000, 90_000], [5_000, 6_000, 36_000, 70_000]
    assert all_reduce.call_s([rank_0, rank_1]) == pytest.approx(26e-6)  # ends: 5, 10, 36, 90
    assert all_reduce.call_s([rank_0]) == pytest.approx(10e-6)


def test_all_reduce_in_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "subprocess", SUBPROCESS)
    monkeypatch.setattr(all_reduce, "COPY_FROM_BYTES", 4096)
    rows = all_reduce.run((1024, 4096), (2,), 2)
    small, large = ("2 ranks, 1 KB", "2 ranks, 4 KB")
    assert [(row.case, row.peer) for row in rows] == [
        ("2 threads copy 4 KB each, at once", "memory copy"),
        (small, "gloo"),
        (f"{small}, new tensor", "gloo"),
        (large, "gloo"),
        (large, "memory copy"),
        (f"{large}, new tensor", "gloo"),
        (f"{large}, new tensor", "memory copy"),
    ]
    for row in rows:
        assert row.ratio is not None
        assert row.low is not None
        assert row.high is not None
        assert 0 < row.low <= row.ratio <= row.high
        assert row.runs == 2
    assert all(row.extra.keys() == {"ours_s", "peer_s", "bytes_s", "over_copy"} for row in rows[1:])


def test_a_wrong_sum_is_no_benchmark() -> None:
    right, wrong = (lambda x: x + 2), (lambda x: x + 1)  # of 1 on rank 0 and 2 on rank 1
    assert len(all_reduce._time_calls(right, lambda: None, 0, 2, 4096)) > 3
    with pytest.raises(MplabError, match="a sum over 2 ranks of 4 KB is wrong on rank 0"):
        all_reduce._time_calls(wrong, lambda: None, 0, 2, 4096)


def test_gloo_is_gone_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GlooProcesses] = []

    def remember(num_ranks: int) -> GlooProcesses:
        made.append(GlooProcesses(num_ranks))
        return made[-1]

    def fail(*_: object) -> float:
        assert all(is_running(process.pid) for process in made[0].processes)
        raise ZeroDivisionError

    monkeypatch.setattr(children, "subprocess", SUBPROCESS)
    monkeypatch.setattr(all_reduce, "GlooProcesses", remember)
    monkeypatch.setattr(all_reduce, "time_threads", fail)
    with pytest.raises(ZeroDivisionError):
        all_reduce.run((1024,), (2,), 1)
    assert len(made[0].processes) == 2
    assert not any(is_running(process.pid) for process in made[0].processes)


# -- world ----------------------------------------------------------------------------------------------------------


def test_world_first_and_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mplab.bench.world, "find_spec", lambda name: None)
    rows = mplab.bench.world.run((2,), 1, ("mp.spawn", "notebook_launcher"))
    assert [(row.case, row.peer, row.runs) for row in rows] == [
        ("2 ranks, first", "mp.spawn", 1),
        ("2 ranks, first", "notebook_launcher", 0),
        ("2 ranks, warm", "mp.spawn", 1),
        ("2 ranks, warm", "notebook_launcher", 0),
    ]
    assert rows[0].extra["peer_s"] == rows[2].extra["peer_s"]  # the same cold start
    assert rows[1].extra == {"note": "accelerate is not installed"}


def script(folder: Path, text: str) -> list[str]:
    (folder / "script.py").write_text(text, "utf-8")
    return [sys.executable, str(folder / "script.py")]


def test_a_launch_that_fails_says_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(MplabError, match=r"torchrun with 2 ranks ended with status 3: (?s:.*)no such luck"):
        mplab.bench.world.launch(script(tmp_path, "print('no such luck'); raise SystemExit(3)"), "torchrun", 2)


def test_a_launch_that_hangs_is_gone_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mplab.bench.world, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(mplab.bench.world, "GRACE_S", 0.2)
    hanging = f"""
import pathlib, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "60"])
pathlib.Path({str(tmp_path)!r}, "pids").write_text(f"{{child.pid}}")
time.sleep(60)
"""
    with pytest.raises(MplabError, match=r"mp\.spawn with 2 ranks took longer than 1 s"):
        mplab.bench.world.launch(script(tmp_path, hanging), "mp.spawn", 2)
    pid = int((tmp_path / "pids").read_text("utf-8"))
    end = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)


def test_the_script_of_the_launchers_needs_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    script = mplab.bench.world.SCRIPT
    for name in [name for name in sys.modules if name.partition(".")[0] == "mplab"]:
        monkeypatch.delitem(sys.modules, name)
    assert runpy.run_path(str(script))["START"]
    assert "mplab" not in sys.modules


def test_rows_are_frozen() -> None:
    row = Row("", "", None, None, None, 0)
    with pytest.raises(AttributeError):
        row.case = "other"  # type: ignore[misc]
