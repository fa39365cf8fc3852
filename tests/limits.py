"""Nobody waits for ever, and nobody leaves anything behind: what tests of worlds run under."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import pytest
import torch


def ranks_alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mplab-rank")]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fails when the block takes longer: a bound on waiting for ever, far above what it needs."""

    def ring(signal_number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still waiting after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Import it into a module: after each of its tests threads and torch's settings are as they were."""
    before = settings()
    with at_most(150):
        yield
    until = time.monotonic() + 1
    while ranks_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert not ranks_alive(), f"{ranks_alive()} left behind"
    assert settings() == before


def settings() -> dict[str, object]:
    return {
        "num_threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "seed": hash(torch.get_rng_state().numpy().tobytes()),
    }


def global_random_states() -> tuple[object, ...]:
    """Those of torch, NumPy (the legacy one, which is the global one) and Python."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


@pytest.fixture(autouse=True)
def memory_comes_back() -> Iterator[None]:
    """Import it into a module of `gpu` tests: none of them leaves memory allocated on the GPU."""
    before = bytes_in_use()
    yield
    assert bytes_in_use() <= before


def bytes_in_use() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # of every stream that multiplied matrices
    return torch.cuda.memory_allocated()
