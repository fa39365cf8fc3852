"""Tensor parallelism over processes: the same losses, gradients, weights and messages as over threads, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import process_ranks
import pytest
from test_processes import Launch

from mplab import World


def launched(num_ranks: int, folder: Path, *scenarios: str) -> Iterator[Launch]:
    with Launch(num_ranks, folder, *scenarios) as launch:
        assert launch.wait() == [0] * num_ranks, launch.errors()
        yield launch


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    pytest.importorskip("transformers")
    yield from launched(2, tmp_path_factory.mktemp("two"), "tensor", "tensor_sequence", "tensor_llama")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    yield from launched(4, tmp_path_factory.mktemp("four"), "tensor", "tensor_sequence")


@pytest.fixture(params=["two", "four"])
def launch(request: pytest.FixtureRequest) -> Launch:
    found: Launch = request.getfixturevalue(request.param)
    return found


def assert_alike(said: list[Any], of_threads: list[Any]) -> None:
    for got, want in zip(said, of_threads, strict=True):
        assert got[0] == want[0]
        assert got[1] == json.loads(json.dumps(want[1]))
        assert got[0] == said[0][0], "whole, and the same on every rank"


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_gpt_trains_as_over_thread_ranks_to_the_bit(launch: Launch, sequence_parallel: bool) -> None:
    of_threads = World(launch.num_ranks, "cpu").run(process_ranks.in_tensors, sequence_parallel)
    assert_alike(launch.said("tensor_sequence" if sequence_parallel else "tensor"), of_threads)
    names = {message[0] for message in of_threads[0][1]}
    assert ("reduce_scatter" in names) == sequence_parallel
    assert len(of_threads[0][0]) > 40


def test_a_llama_trains_as_over_thread_ranks_to_the_bit(two: Launch) -> None:
    of_threads = World(2, "cpu").run(process_ranks.llama_in_tensors, process_ranks.llama())
    assert_alike(two.said("tensor_llama"), of_threads)
    assert len(of_threads[0][0]) > 40
