"""Which tests this machine can run, and in which order."""

from __future__ import annotations

import gc
import importlib.util

import pytest
import torch
from browser import CHROMIUM_NAMES, find_chromium
from hypothesis import settings

# No time makes a test fail.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# With several workers: what begins first, so that none of them is left alone with one of these at the end. The labs and
# then the files that take longest; many of them wait for processes and browsers while others compute.
FIRST = (
    "05_hybrid_parallel",
    "04_tensor_parallel",
    "test_processes",
    "test_browser",
    "03_layer_parallel",
    "test_two_hosts",
    "02_data_parallel",
    "test_mpi",
    "test_process_faults",
    "01_collectives",
    "test_checkpoint",
    "00_start_here",
    "test_bench_hybrid",
    "test_bench_peers",
    "test_threads",
    "test_equivalence_tensor",
    "test_equivalence",
    "test_equivalence_hybrid",
    "test_faults",
    "test_homework_tensor",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # A second thread of torch would wait for work in a loop, on a core that another worker needs. Ranks have one
        # each anyway.
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    reasons = {"gpu": why_no_gpu(), "browser": why_no_browser()}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: else the garbage collector looks through 600,000 objects again and again."""
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])  # the first one loads as much again as torch itself
    gc.collect()
    gc.freeze()


def why_no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA device, and torch sees none"


def why_no_browser() -> str | None:
    if importlib.util.find_spec("playwright") is None or importlib.util.find_spec("jupyterlab") is None:
        return 'needs Playwright and JupyterLab: pip install -e ".[lab,test]"'
    if find_chromium() is None:
        return f"needs a Chromium: none of {', '.join(CHROMIUM_NAMES)} is on the PATH"
    return None
