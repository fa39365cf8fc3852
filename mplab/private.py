"""The only place that touches what torch does not promise to keep: each name tried here, and what to do without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


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


def add_each_(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """x += y for each pair, without going through Python for each, where torch can."""
    _for_each_pair("_foreach_add_", Tensor.add_, xs, ys)


def copy_each_(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """x becomes y for each pair, without going through Python for each, where torch can."""
    _for_each_pair("_foreach_copy_", Tensor.copy_, xs, ys)


def _for_each_pair(name: str, one: Callable[[Tensor, Tensor], Any], xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """torch's function of this name over lists, or else one pair after the other."""
    of_lists = getattr(torch, name, None)
    if of_lists is not None:
        of_lists(list(xs), list(ys))
        return
    for x, y in zip(xs, ys, strict=True):
        one(x, y)


def norms(xs: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each, on a GPU in float64, without going through Python for each, where torch can."""
    dtype = torch.float64 if xs and xs[0].is_cuda and not xs[0].is_complex() else None
    try:
        norm = torch._foreach_norm
    except AttributeError:
        return [torch.linalg.vector_norm(x, dtype=dtype) for x in xs]
    return list(norm(list(xs), 2, dtype=dtype))


def is_shared(x: Tensor) -> bool:
    """Whether another tensor lies in the same memory, autograd's own included; True if torch does not tell."""
    try:
        count = torch._C._storage_Use_Count
    except AttributeError:
        return True
    return bool(count(x.untyped_storage()._cdata) > 2)  # the tensor, and what `untyped_storage` has just made


def seeing_ops(see: Callable[[Any, Any, Any], None]) -> AbstractContextManager[Any] | None:
    """Inside it `see(op, arguments, result)` is called after every op of this thread, backward's too; None if torch
    lacks it. What torch makes public sees an op where Python calls it, and so none of backward's.
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        return None

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            see(func, (args, kwargs), result)
            return result

    seeing: AbstractContextManager[Any] = Seeing()  # type: ignore[no-untyped-call]
    return seeing
