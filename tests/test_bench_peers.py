"""The benchmarks of two ranks, run small: every row beside its peers, which are processes that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import pytest
from forked import SUBPROCESS

from mplab import MplabError
from mplab.bench import data, pipeline, tensor, zero
from mplab.bench.common import Row
from mplab.bench.tensor import Case
from mplab.bench.torch_data import NUM_RANKS, Size
from mplab.world import children
from mplab.world.children import GlooProcesses

TINY = Size(width=8, sequence=8, batch_size=4)


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooProcesses]:
    """Torch's, for all tests. They are forked, as are those that a benchmark starts besides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "subprocess", SUBPROCESS)
        with GlooProcesses(NUM_RANKS) as processes:
            yield processes


@pytest.fixture
def shared(gloo: GlooProcesses, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Makes a benchmark take these processes for torch's ranks; it starts others if it has ranks of ours, too."""

    def share(bench: ModuleType) -> None:
        left: list[AbstractContextManager[GlooProcesses]] = [nullcontext(gloo)]
        monkeypatch.setattr(bench, "GlooProcesses", lambda n: left.pop() if left else GlooProcesses(n))

    return share


def named(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.case, row.peer) for row in rows]


def test_data_parallelism_beside_its_peers(shared: Callable[[ModuleType], None]) -> None:
    shared(data)
    rows = data.run({"tiny": TINY}, num_rounds=2, num_steps=1)
    assert named(rows) == [
        ("tiny", "DDP"),
        ("tiny", "one process"),
        ("tiny, gloo processes", "DDP"),
        ("tiny, gloo processes", "one process"),
    ]
    for row in rows:
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.runs == 2
        assert row.extra.keys() == {"ours_s", "peer_s"}
    # Of the same rounds.
    assert rows[0].extra["peer_s"] == rows[2].extra["peer_s"]
    assert rows[0].extra["ours_s"] == rows[1].extra["ours_s"]


def test_every_stage_beside_its_peers(shared: Callable[[ModuleType], None]) -> None:
    shared(zero)
    rows = zero.run({"tiny": TINY}, num_rounds=2, num_steps=1)
    *timed, kept = rows
    assert named(timed) == [
        ("stage 3, tiny", "FSDP2"),
        ("stage 2, tiny", "FSDP2"),
        ("stage 2, tiny", "FSDP2 without resharding"),
        ("stage 1, tiny", "FSDP2"),
        ("stage 1, tiny", "ZeroRedundancyOptimizer"),
    ]
    for row in timed:
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.runs == 2
    assert (kept.case, kept.peer, kept.runs) == ("memory at rest, stage 3, tiny", "FSDP2", 1)
    assert kept.ratio == pytest.approx(1, abs=0.1)  # both keep half of four times the weights
    assert "MB beside" in str(kept.extra["note"])


def test_tensor_parallelism_beside_its_peers(shared: Callable[[ModuleType], None]) -> None:
    shared(tensor)
    rows = tensor.run({"GPT": Case("GPT", TINY, True), "MLP": Case("MLP", TINY)}, num_rounds=2, num_steps=1)
    assert named(rows) == [
        ("GPT", "DTensor"),
        ("GPT", "one thread"),
        ("GPT, one process", "DTensor"),
        ("GPT, gloo processes", "DTensor"),
        ("GPT, sequence parallel", "DTensor"),
        ("GPT, one thread", "DTensor"),
        ("GPT, sequence parallel", "DTensor, sequence parallel"),
        ("MLP", "DTensor"),
        ("MLP", "one thread"),
        ("MLP, one process", "DTensor"),
        ("MLP, gloo processes", "DTensor"),
        ("MLP, one thread", "DTensor"),
    ]
    for row in rows:
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.runs == 2
        assert row.extra.keys() == {"ours_s", "peer_s"} | ({"peer_plan"} if row.peer != "one thread" else set())


def test_every_schedule_beside_its_peers(shared: Callable[[ModuleType], None]) -> None:
    shared(pipeline)
    rows = pipeline.run({"tiny": 8}, num_rounds=2, num_steps=1)
    timed, kept = rows[:-2], rows[-2:]
    assert named(timed) == [
        ("zero-bubble tiny", "torch 1F1B"),
        ("zero-bubble tiny", "torch zero-bubble"),
        ("zero-bubble tiny", "one process"),
        ("1F1B tiny", "torch 1F1B"),
        ("1F1B tiny", "one process"),
        ("GPipe tiny", "torch GPipe"),
        ("GPipe tiny", "one process"),
        ("interleaved tiny", "torch interleaved"),
        ("interleaved tiny", "one process"),
    ]
    for row in timed:
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.runs == 2
        bubbles = {"bubble", "schedule_bubble"} | ({"peer_bubble"} if row.peer != "one process" else set())
        assert row.extra.keys() == {"ours_s", "peer_s", *bubbles}
        assert all(0 < float(row.extra[name]) < 1 for name in bubbles)
    assert {row.case: row.extra["schedule_bubble"] for row in timed} == {
        "zero-bubble tiny": pytest.approx(1 / 25),
        "1F1B tiny": pytest.approx(1 / 9),
        "GPipe tiny": pytest.approx(1 / 9),
        "interleaved tiny": pytest.approx(1 / 17),
    }
    # Of the same rounds, so that these two differ by what torch's zero-bubble takes of torch's 1F1B.
    assert timed[0].extra["ours_s"] == timed[1].extra["ours_s"]
    assert timed[0].extra["peer_s"] == timed[3].extra["peer_s"]
    assert [(row.case, row.peer, row.runs) for row in kept] == [
        ("activation memory, 1F1B tiny", "GPipe", 1),
        ("activation memory, 1F1B tiny", "torch 1F1B", 1),
    ]
    assert all("MB beside" in str(row.extra["note"]) for row in kept)


def test_no_pipeline_is_timed_that_trains_otherwise(
    monkeypatch: pytest.MonkeyPatch, shared: Callable[[ModuleType], None]
) -> None:
    shared(pipeline)
    monkeypatch.setattr(pipeline, "LEARNING_RATE", 0.2)  # here, and not in the processes
    monkeypatch.setattr(pipeline, "paired", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(MplabError, match=r"torch 1F1B tiny: its losses .* are not one process's"):
        pipeline.run({"tiny": 16}, 1, 1, ["1f1b"])
