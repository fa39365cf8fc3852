"""What a message costs: alpha and beta of each rung's links, fitted to ping-pong times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.trace.units import format_bandwidth, format_s
from mplab.world.children import GlooProcesses
from mplab.world.rank import Rank
from mplab.world.world import World

SIZES_BYTES = tuple(1 << k for k in range(10, 25, 2))  # 1 KB to 16 MB


@dataclass(frozen=True)
class LinkFit:
    """alpha + beta * B fitted to the measured times of messages, with the measurements it comes from.

    Args:
        rung: what the message goes through: "CPU threads", "CUDA streams", "GPUs" or "gloo processes".
        latency_s: alpha, the seconds of a message without bytes.
        bandwidth_bytes_s: 1 / beta; `math.inf` where larger messages took no longer.
        sizes_bytes: bytes of the measured messages.
        times_s: the median time of one message of each size: half of a ping-pong.
    """

    rung: str
    latency_s: float
    bandwidth_bytes_s: float
    sizes_bytes: tuple[int, ...]
    times_s: tuple[float, ...]

    @property
    def link(self) -> Link:
        """The two numbers alone, as the cost model and `World(link=...)` take them."""
        return Link(self.latency_s, self.bandwidth_bytes_s)

    @property
    def fitted_s(self) -> tuple[float, ...]:
        """What the fit says for every measured size, in seconds."""
        return tuple(self.link.time_s(1, size) for size in self.sizes_bytes)

    @property
    def residuals(self) -> tuple[float, ...]:
        """(measured - fitted) / measured for every size: 0.1 is 10 % slower than the model says."""
        return tuple((t - fitted) / t for t, fitted in zip(self.times_s, self.fitted_s, strict=True))

    @property
    def worst_residual(self) -> float:
        """The largest of them, without its sign."""
        return max(abs(r) for r in self.residuals)

    def __str__(self) -> str:
        is_free = math.isinf(self.bandwidth_bytes_s)
        rate = "any number of GB/s" if is_free else format_bandwidth(self.bandwidth_bytes_s)
        off = f"off by up to {self.worst_residual:.0%}"
        return f"{self.rung}: alpha {format_s(self.latency_s)}, 1/beta {rate} ({off})"


def fit_link(rung: str, sizes_bytes: Sequence[int], times_s: Sequence[float]) -> LinkFit:
    """The alpha and beta, neither below 0, that make the sum of squared *relative* errors least.

    Relative, because the times span four orders of magnitude: otherwise the largest message alone would decide, and
    alpha would be noise.

    Args:
        rung: what was measured.
        sizes_bytes: two sizes or more.
        times_s: seconds of one message of each size, above 0.

    Raises:
        MplabError: fewer than two different sizes, or a time that is not above 0.
    """
    if len(sizes_bytes) != len(times_s) or len(set(sizes_bytes)) < 2 or min(times_s) <= 0:
        raise MplabError(
            f"fit_link of sizes {list(sizes_bytes)} and times {list(times_s)}: a line needs two different sizes or "
            "more, and a time above 0 s for each"
        )
    sizes, times = np.asarray(sizes_bytes, float), np.asarray(times_s, float)
    columns = np.stack([1 / times, sizes / times], axis=1)
    scale = columns.max(axis=0)
    alpha, beta = np.linalg.lstsq(columns / scale, np.ones(len(times)))[0] / scale
    if alpha < 0 or beta < 0:  # then the best allowed fit has the other one alone
        column = columns[:, 1] if alpha < 0 else columns[:, 0]
        only = float(column.sum() / (column @ column))
        alpha, beta = (0.0, only) if alpha < 0 else (only, 0.0)
    bandwidth = 1 / float(beta) if beta > 0 else math.inf
    return LinkFit(rung, float(alpha), bandwidth, tuple(sizes_bytes), tuple(times_s))


def measure_threads(device: str, sizes_bytes: Sequence[int] = SIZES_BYTES) -> LinkFit:
    """Messages between two ranks of this process, as `comm.send` and `comm.recv` do them.

    Args:
        device: "cpu"; one GPU for two streams of it; "cuda" for two GPUs where there are two.
        sizes_bytes: sizes of the messages.
    """
    world = World(2, device)
    return fit_link(world.rung.name, sizes_bytes, world.run(_thread_ping_pong, sizes_bytes)[0])


def measure_gloo(sizes_bytes: Sequence[int] = SIZES_BYTES) -> LinkFit:
    """Messages between two processes of this machine, as torch.distributed's gloo does them over the loopback."""
    with GlooProcesses(2) as gloo:
        return fit_link("gloo processes", sizes_bytes, gloo.call(gloo_ping_pong, list(sizes_bytes))[0])


def _thread_ping_pong(rank: Rank, sizes_bytes: Sequence[int]) -> list[float]:
    comm, peer = rank.comm, 1 - rank.index

    def recv(_: Tensor) -> None:
        comm.recv(peer)
        if rank.device.type == "cuda":  # it is here when the GPU has it, not when the host was told
            torch.cuda.current_stream().synchronize()

    return _ping_pong(rank.index, lambda x: comm.send(x, peer), recv, rank.device, sizes_bytes)


def gloo_ping_pong(rank: int, sizes_bytes: Sequence[int]) -> list[float]:
    """One of two gloo processes' side."""
    import torch.distributed as dist

    return _ping_pong(
        rank, lambda x: dist.send(x, 1 - rank), lambda x: dist.recv(x, 1 - rank), torch.device("cpu"), sizes_bytes
    )


def _ping_pong(
    index: int,
    send: Callable[[Tensor], object],
    recv: Callable[[Tensor], object],
    device: torch.device,
    sizes_bytes: Sequence[int],
) -> list[float]:
    """The median time of one message of each size, in seconds."""
    medians = []
    for size in sizes_bytes:
        x = torch.ones(size, dtype=torch.uint8, device=device)
        steps = (send, recv) if index == 0 else (recv, send)
        times = []
        for _ in range(num_round_trips(size)):
            start = time.perf_counter_ns()
            for step in steps:
                step(x)
            times.append(time.perf_counter_ns() - start)
        medians.append(statistics.median(times[1:]) * 1e-9 / 2)  # the first one warms up
    return medians


def num_round_trips(size_bytes: int) -> int:
    """Many of the small ones, which vary, and a few of the large ones, which take long."""
    return 1 + max(5, min(200, (32 << 20) // size_bytes))
