"""When a benchmark begins to count: after a step to warm up, and a barrier of all processes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from mplab.bench import torch_data


def check_stamps(peer: ModuleType, stamps: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps, by a clock that shows how many things have happened.

    Args:
        peer: whose `side` takes the steps.
        stamps: calls its `stamps`.
        monkeypatch: undoes it.
    """
    order: list[str] = []

    class Steps:
        def step(self) -> float:
            order.append("step")
            return 0.0

    def clock() -> int:
        order.append("clock")
        return len(order)

    monkeypatch.setattr(peer, "side", lambda *args: Steps())
    monkeypatch.setattr(torch_data.dist, "barrier", lambda: order.append("barrier"))
    monkeypatch.setattr(torch_data.time, "perf_counter_ns", clock)
    times = stamps()
    assert order == ["step", "barrier", "clock", "step", "clock", "step", "clock"]
    assert times == [3, 5, 7]
