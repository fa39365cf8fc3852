"""A block of the GPT, whole on one rank and cut over several: measured in parts, predicted, and really run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mplab.errors import MplabError
from mplab.models import GPT, GPTConfig
from mplab.parallel import tensor_parallel
from mplab.parallel.tensor_model import connect
from mplab.parallel.tensor_plan import GPT_PLAN
from mplab.plan.cost import Link
from mplab.plan.tensor import Block, BlockTime, block_flops, block_time_s
from mplab.trace.intervals import length_s, merge
from mplab.world import Rank, World
from mplab.world.links import fit_link
from mplab.world.machine import Machine, machine

MAX_RANKS = 8
_BLOCKS = "blocks.*."
PLAN = {name.removeprefix(_BLOCKS): style for name, style in GPT_PLAN.items() if name.startswith(_BLOCKS)}

# What is measured at the start: a block that is mostly computation, one that is Python alone, and all-reduces.
_LARGE, _TINY = Block(1, 64, 256, MAX_RANKS), Block(1, 1, MAX_RANKS, MAX_RANKS)
_ALL_REDUCES_BYTES = tuple(1 << k for k in range(12, 24, 2))  # 4 KiB to 4 MiB
_NUM_BLOCKS, _NUM_ALL_REDUCES = 5, 11


@dataclass(frozen=True)
class BlockSpeeds:
    """What blocks cost this machine's ranks, by the number of ranks that work at once.

    Args:
        flops_s: what each of them computes, FLOPs a second.
        python_s: what each needs for a block however small it is: Python, and torch's way to its kernels.
        link: what connects two ranks; through memory, a latency and a bandwidth too.
        machine: this one, and its load then.
    """

    flops_s: Mapping[int, float]
    python_s: Mapping[int, float]
    link: Link
    machine: Machine = field(default_factory=machine)

    def time_s(self, block: Block, num_ranks: int, emulated: Link | None = None) -> BlockTime:
        """How long forward and backward of a block should take.

        Args:
            block: its sizes.
            num_ranks: over which it is cut; 1: it is whole.
            emulated: link of the world. No message is faster than without it.
        """
        compute_s, communication_s = block_time_s(block, num_ranks, self.flops_s[num_ranks], self.link)
        if emulated is not None:
            emulated_s = block_time_s(block, num_ranks, self.flops_s[num_ranks], emulated).communication_s
            communication_s = max(communication_s, emulated_s)
        return BlockTime(self.python_s[num_ranks] + compute_s, communication_s)

    def saved_s(self, block: Block, num_ranks: int) -> float:
        """What a rank computes less than if it were alone; below 0 where Python costs more than is saved."""
        return self.time_s(block, 1).compute_s - self.time_s(block, num_ranks).compute_s

    def smallest_paying_width(
        self, block: Block, num_ranks: int, emulated: Link | None, widths: Iterable[int]
    ) -> int | None:
        """The smallest of some widths at which the ranks are faster than one; None: at none."""
        for width in sorted(widths):
            wide = replace(block, width=width)
            if self.time_s(wide, num_ranks, emulated).total_s < self.time_s(wide, 1).total_s:
                return width
        return None


def measure_block_speeds(
    world_size_max: int = 4, flops_s: float | None = None, link: Link | None = None
) -> BlockSpeeds:
    """What blocks cost 1, 2, 4, ... thread ranks of this machine, each with one core where there are enough.

    Args:
        world_size_max: the most ranks, 2 to 8.
        flops_s: what one rank alone computes, FLOPs a second: ranks that share cores share it, and Python takes no
            time. None: measured, on ranks that compute at the same time.
        link: what connects two ranks; None: measured, by all-reduces.

    Raises:
        MplabError: a number out of its range.
    """
    if flops_s is not None and not flops_s > 0:
        raise MplabError(f"flops_s={flops_s}: give more than 0 (1e9 is a billion a second), or None to measure it")
    here, counts = machine(), [1, *ranks_up_to(world_size_max)]
    rates, python_s = dict[int, float](), dict.fromkeys(counts, 0.0)
    for num_ranks in counts:
        if flops_s is not None:
            rates[num_ranks] = flops_s * min(1.0, here.num_cores / num_ranks)
            continue
        # Ranks that disturb one another make a tiny block take any time: a tenth of the large one's is computing.
        tiny_s, large_s = (max(of_all) for of_all in zip(*World(num_ranks, "cpu").run(_compute), strict=True))
        python_s[num_ranks] = min(tiny_s, 0.9 * large_s)
        rates[num_ranks] = block_flops(_LARGE) / (large_s - python_s[num_ranks])
    if link is None:
        # Over two ranks an all-reduce is two messages of half of the tensor, one after the other.
        times_s = World(2, "cpu").run(_all_reduce)[0]
        link = fit_link("CPU threads", [size // 2 for size in _ALL_REDUCES_BYTES], [t / 2 for t in times_s]).link
    return BlockSpeeds(rates, python_s, link, here)


def ranks_up_to(world_size_max: int) -> list[int]:
    """The numbers of ranks that a block can be cut over here: 2, 4, 8.

    Raises:
        MplabError: a number out of that range.
    """
    if not 2 <= world_size_max <= MAX_RANKS:
        raise MplabError(f"world_size_max={world_size_max}: give 2 to {MAX_RANKS}, the heads of the block")
    return [n for n in (2, 4, 8) if n <= world_size_max]


class BlockRun(NamedTuple):
    """A block that really ran, some times whole and as often cut; the first time of each does not count.

    Args:
        serial: what each time took one rank.
        parallel: what it took all ranks, from the first one's start to the last one's end. Communication: messages,
            and waiting for one another; all else counts as compute.
        num_messages: that rank 0 sent in one.
        sent_bytes: by rank 0 in one.
        difference: the largest between outputs of the whole block and of the cut one.
    """

    serial: list[BlockTime]
    parallel: list[BlockTime]
    num_messages: int
    sent_bytes: int
    difference: float


def run_block(block: Block, num_ranks: int, link: Link | None, num_runs: int) -> BlockRun:
    """Forward and backward of a block, on one thread, and then cut over thread ranks.

    Args:
        block: its sizes.
        num_ranks: over which it is cut.
        link: an emulated one; None: as fast as this machine is.
        num_runs: that count.

    Raises:
        Exception: what a rank raised.

    **Communication**: `mplab.plan.tensor.block_traffic` each time, and a barrier before it; cutting is not timed.
    """
    config = GPTConfig(num_layers=1, width=block.width, num_heads=block.num_heads, context_length=1, vocab_size=1)
    whole = GPT(config).blocks[0]
    parts = World(num_ranks, "cpu").run(lambda rank: tensor_parallel(whole, rank.comm, PLAN))
    alone, world = World(1, "cpu"), World(num_ranks, "cpu", link=link)
    expected = alone.run(_forward_and_backward, [whole], block, num_runs)[0]
    outputs = world.run(_forward_and_backward, parts, block, num_runs)
    sent = [message for message in world.ledgers[0].of() if message.op != "barrier"]
    return BlockRun(
        _times(alone),
        _times(world),
        sum(message.num_messages for message in sent) // (num_runs + 1),
        sum(message.sent_bytes for message in sent) // (num_runs + 1),
        max(float((output - expected).abs().max()) for output in outputs),
    )


def median_time(times: Iterable[BlockTime]) -> BlockTime:
    """The one in the middle; of an even number the shorter of two."""
    ordered = sorted(times, key=lambda taken: taken.total_s)
    return ordered[(len(ordered) - 1) // 2]


def _forward_and_backward(rank: Rank, modules: list[nn.Module], block: Block, num_runs: int) -> Tensor:
    """Run this rank's module; returns its output."""
    module, output = modules[rank.index], torch.empty(0)
    connect(module, rank.comm)
    x, gradient = _inputs(block)
    for _ in range(num_runs + 1):
        module.zero_grad()
        rank.comm.barrier()
        with rank.span("block"):
            output = module(x)
            output.backward(gradient)
    return output.detach()


def _inputs(block: Block) -> tuple[Tensor, Tensor]:
    """What enters the block, with a gradient as after another one, and the gradient of what leaves it."""
    shape, generator = (block.batch_size, block.sequence, block.width), torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).requires_grad_(), torch.randn(shape, generator=generator)


def _times(world: World) -> list[BlockTime]:
    """What every block of a run but the first took."""
    of_ranks = [world.timeline.rank(r) for r in range(world.size)]
    away = [merge((e.start_s, e.end_s) for e in events if e.lane in ("message", "wait")) for events in of_ranks]
    spans = [[(e.start_s, e.end_s) for e in events if e.name == "block"] for events in of_ranks]
    times = []
    for of_run in list(zip(*spans, strict=True))[1:]:
        start_s, end_s = min(start for start, _ in of_run), max(end for _, end in of_run)
        away_s = statistics.mean(
            length_s([interval for interval in of_rank if start <= interval[0] and interval[1] <= end])
            for of_rank, (start, end) in zip(away, of_run, strict=True)
        )
        times.append(BlockTime(end_s - start_s - away_s, away_s))
    return times


def _compute(rank: Rank) -> tuple[float, float]:
    """The median seconds of a tiny block and of a large one; no rank has anything to do with the others' blocks."""
    medians = []
    for block in (_TINY, _LARGE):
        config = GPTConfig(num_layers=1, width=block.width, num_heads=block.num_heads, context_length=1, vocab_size=1)
        module, (x, gradient) = GPT(config).blocks[0], _inputs(block)
        rank.comm.barrier()

        def work(module: nn.Module = module, x: Tensor = x, gradient: Tensor = gradient) -> None:
            module.zero_grad()
            module(x).backward(gradient)

        medians.append(_median_s(work, _NUM_BLOCKS))
    return medians[0], medians[1]


def _all_reduce(rank: Rank) -> list[float]:
    """The median seconds of an all-reduce of every size."""
    medians = []
    for size in _ALL_REDUCES_BYTES:
        x = torch.zeros(size // 4)

        def work(x: Tensor = x) -> None:
            rank.comm.all_reduce_(x)

        medians.append(_median_s(work, _NUM_ALL_REDUCES))
    return medians


def _median_s(work: Callable[[], object], num_times: int) -> float:
    """Of some times, after one that warms up."""
    times = []
    for _ in range(num_times + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
