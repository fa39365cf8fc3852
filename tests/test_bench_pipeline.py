"""The pipeline benchmark: every row, a bubble and bytes counted by hand, and nothing timed that trains wrongly."""

from __future__ import annotations

import math

import pytest
import torch

from mplab import MplabError
from mplab.bench import pipeline
from mplab.bench.torch_pipeline import NUM_MICROBATCHES, NUM_RANKS
from mplab.models import seeded
from mplab.trace.saved import SavedBytes


def test_every_schedule_beside_its_peers() -> None:
    rows = pipeline.run({"tiny": 8}, num_rounds=2, num_steps=1)
    timed, kept = rows[:-2], rows[-2:]
    assert [(row.case, row.peer) for row in timed] == [
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


def test_1f1b_keeps_p_of_m_micro_batches() -> None:
    one_f_one_b, gpipe = (pipeline.Ours(s, 8).saved_bytes() for s in ("1f1b", "gpipe"))
    for rank in range(NUM_RANKS):
        one = gpipe[rank] / NUM_MICROBATCHES
        assert one_f_one_b[rank] == pytest.approx((NUM_RANKS - rank) * one, rel=0.1)  # tokens of all are one storage
    assert max(one_f_one_b) <= max(gpipe) * (NUM_RANKS + 1) / NUM_MICROBATCHES


def test_nothing_is_timed_that_trains_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LEARNING_RATE", 0.2)  # here, and not in the processes
    monkeypatch.setattr(pipeline, "paired", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(MplabError, match=r"torch 1F1B tiny: its losses .* are not one process's"):
        pipeline.run({"tiny": 8}, 1, 1, ["1f1b"])


@pytest.mark.parametrize("losses", [[5.0, 4.0002], [5.0, math.nan], [5.0], []])
def test_losses_that_are_not_those_of_one_process(losses: list[float]) -> None:
    pipeline.check("1F1B", [5.00005, 4.0], [5.0, 4.0])
    with pytest.raises(MplabError, match="1F1B: its losses"):
        pipeline.check("1F1B", losses, [5.0, 4.0])


def test_bubbles_by_hand() -> None:
    rank_0 = [[(0, 10), (20, 30)], [(100, 110)]]
    rank_1 = [[(10, 20), (30, 40)], [(105, 125)]]
    assert pipeline.bubbles([rank_0, rank_1]) == pytest.approx([1 - 20 / 40, 1 - 15 / 25])


def test_saved_bytes_by_hand() -> None:
    weight = seeded("weight", (4, 4)).requires_grad_()
    x = seeded("x", (2, 4)).requires_grad_()  # 32 bytes
    with SavedBytes([weight]) as saved:
        y = (x @ weight).exp()  # saves x and the weight, then its own output: another 32 bytes
        assert saved.peak_bytes == 64
        z = (x[:1] @ weight).sum()  # x again
        assert saved.peak_bytes == 64
        y.sum().backward()
        z.backward()
        y = (x @ weight).exp()
        assert saved.peak_bytes == 64  # what was let go does not count
        z = torch.stack([x @ weight, x @ weight]).exp()
        assert saved.peak_bytes == 128
    with SavedBytes([]) as saved:
        _ = x @ weight
    assert saved.peak_bytes == 32 + 64  # now the weight is nobody's parameter
