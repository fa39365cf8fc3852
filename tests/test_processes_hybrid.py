"""Every strategy at once over processes: the same losses, weights and messages as over threads, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator

import process_ranks
import pytest
from test_processes import Launch

from mplab import World


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with Launch(4, tmp_path_factory.mktemp("four"), "hybrid", "parallelized") as launch:
        assert launch.wait() == [0] * 4, launch.errors()
        yield launch


def test_a_gpt_trains_as_over_thread_ranks_to_the_bit(four: Launch) -> None:
    of_threads = World(4, "cpu").run(process_ranks.in_every_axis)
    said = four.said("hybrid")
    for got, want in zip(said, of_threads, strict=True):
        assert got[0] == want[0] == said[0][0], "whole, and the same on every rank"
        assert got[1] == json.loads(json.dumps(want[1]))
        groups = {tuple(message[1]) for message in got[1]}
        assert {len(group) for group in groups} >= {2, 4}
    assert len(said[0][0]) > 40


def test_one_call_trains_in_every_process(four: Launch) -> None:
    assert four.said("parallelized") == [process_ranks.by_one_call(World(4, "cpu"))] * 4
