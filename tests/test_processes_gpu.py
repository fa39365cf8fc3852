"""Ranks that are processes with a GPU each: tensors of collectives over NCCL, messages through the CPU's memory.

Skipped where there are fewer GPUs than processes; one process has NCCL to itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conformance import CHECKS
from test_processes import Launch

pytestmark = pytest.mark.gpu


class OnGpus(Launch):
    """A GPU for each process."""

    backend = "nccl"
    gpus: Mapping[str, str] = {}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_collectives_and_training_over_nccl(num_ranks: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs, and torch sees {torch.cuda.device_count()}")
    everyone = list(range(num_ranks))
    with OnGpus(num_ranks, tmp_path, "conformance", "on_gpus") as launch:
        assert launch.wait() == [0] * num_ranks, launch.errors()
        assert launch.said("conformance") == [len(CHECKS)] * num_ranks
        assert launch.said("on_gpus") == [["nccl", f"cuda:{rank}", everyone] for rank in everyone]
