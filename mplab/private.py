"""The only place that touches what torch does not promise to keep: each name tried here, and what to do without it."""

from __future__ import annotations

import os
from typing import Any

import torch


def all_threads_config() -> Any | None:
    """Makes torch's profiler record every thread, and not the calling one alone; None if torch lacks it."""
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except (AttributeError, TypeError):
        return None


def quiet_kineto() -> None:
    """Before a profiler starts: keep its library from printing a line at each start and stop (torch 2.13)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def is_profiler_running() -> bool:
    """Whether a torch profiler runs in this process: a second one would end it and make its trace unreadable."""
    return bool(getattr(torch.autograd.profiler, "_is_profiler_enabled", False))


def trace_start_ns(profiler: torch.profiler.profile) -> int | None:
    """When a stopped profiler's trace began (`time.time_ns`); 0 if it was lost, and then its export crashes."""
    result: Any = getattr(profiler.profiler, "kineto_results", None)
    return int(result.trace_start_ns()) if hasattr(result, "trace_start_ns") else None
