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


def test_1f1b_keeps_p_of_m_micro_batches() -> None:
    one_f_one_b, gpipe = (pipeline.Ours(s, 8).saved_bytes() for s in ("1f1b", "gpipe"))
    for rank in range(NUM_RANKS):
        one = gpipe[rank] / NUM_MICROBATCHES
        assert one_f_one_b[rank] == pytest.approx((NUM_RANKS - rank) * one, rel=0.1)  # tokens of all are one storage
    assert max(one_f_one_b) <= max(gpipe) * (NUM_RANKS + 1) / NUM_MICROBATCHES


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
