"""A script, run by path in a fresh process: the first all-reduce of new ranks, in each way to start them.

It imports torch before its clock starts, as a notebook has by then, and nothing of this library unless it is its turn.
"python launchers.py HOW NUM_RANKS FOLDER" leaves in FOLDER the host times (`perf_counter_ns`) of the call, "start", and
of each rank's first result, "0", "1", ...
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

NUM_WARM = 21


def leave(folder: str, name: str, value: float) -> None:
    """Write one number down."""
    Path(folder, name).write_text(str(value), "utf-8")


def first_sum(rank: int, num_ranks: int, folder: str) -> None:
    """What a rank of torch.distributed does: join the others, sum, and say when it had the sum."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=num_ranks)
    x = torch.ones(1)
    dist.all_reduce(x)
    leave(folder, str(rank), time.perf_counter_ns())
    if x.item() != num_ranks:
        raise ArithmeticError(f"the sum of {num_ranks} ones is {x.item()}")
    dist.destroy_process_group()


def first_sum_from_env(folder: str) -> None:
    """The same, where a launcher says which rank this is."""
    first_sum(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder)


def start_mplab(num_ranks: int, folder: str) -> None:
    """A world of thread ranks: its first run in the process, and then warm ones."""
    from mplab import Rank, World

    def sum_of_ones(rank: Rank) -> float:
        return rank.comm.all_reduce(torch.ones(1)).item()

    leave(folder, "start", time.perf_counter_ns())
    sums = World(num_ranks, "cpu").run(sum_of_ones)
    leave(folder, "0", time.perf_counter_ns())
    if sums != [num_ranks] * num_ranks:
        raise ArithmeticError(f"the sums of {num_ranks} ones are {sums}")
    times = []
    for _ in range(NUM_WARM):
        start = time.perf_counter()
        World(num_ranks, "cpu").run(sum_of_ones)
        times.append(time.perf_counter() - start)
    leave(folder, "warm_s", statistics.median(times))


def start_spawn(num_ranks: int, folder: str) -> None:
    """torch.multiprocessing: processes that import everything anew."""
    from torch.multiprocessing.spawn import spawn

    leave(folder, "start", time.perf_counter_ns())
    spawn(first_sum, (num_ranks, folder), num_ranks)


def start_notebook_launcher(num_ranks: int, folder: str) -> None:
    """accelerate: forked processes."""
    from accelerate import notebook_launcher  # type: ignore[import-not-found,unused-ignore]

    leave(folder, "start", time.perf_counter_ns())
    notebook_launcher(first_sum_from_env, (folder,), num_ranks, use_port="0")


START = {"mplab": start_mplab, "mp.spawn": start_spawn, "notebook_launcher": start_notebook_launcher}

if __name__ == "__main__":
    how, num_ranks_text, folder_name = sys.argv[1:]
    if how == "torchrun":  # this process is a rank already: whoever called torchrun left "start"
        first_sum_from_env(folder_name)
    else:
        START[how](int(num_ranks_text), folder_name)
