"""How processes that `mpirun` or `srun` started find each other: they are all of MPI's world, by way of mpi4py."""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from mplab.comm.mpi import MpiWire
from mplab.comm.wire import Deliver, Lose, Wire
from mplab.errors import MplabError
from mplab.world import join as by_torchrun
from mplab.world import rungs
from mplab.world.join import Member

if TYPE_CHECKING:
    from mpi4py import MPI

# What Open MPI, MPICH with its kin, and whoever speaks PMIx (Slurm) give to the processes that they start.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
VARIABLES = (*SIZES, "PMIX_RANK")
# After a failure all processes have this long to end by themselves.
END_TIMEOUT_S = 1.0
LOOK_EVERY_S = 1e-3
# A user's own messages in MPI's world hardly have this tag; one for each world that this process joins.
FIRST_TAG, NUM_TAGS = 31_000, 1_000

_num_joined = 0
_is_joined = False
_has_failed = False  # the last world, or the way into it


class Joined(NamedTuple):
    """A world that this process has joined.

    Args:
        rank: its rank.
        members: all processes, in rank order.
        num_cores: cores that the ranks on its host may use, all together: mpirun gives each its own.
        make_wire: makes its wire to the others.
    """

    rank: int
    members: list[Member]
    num_cores: int
    make_wire: Callable[[int, int, Deliver, Lose], Wire]


def join(timeout_s: float) -> Joined:
    """Join the other processes.

    Args:
        timeout_s: how long to wait for them, but at least 30 s.

    Raises:
        MplabError: mpi4py is missing or was made for another MPI, one of the others did not come, or GPUs are too few.
    """
    global _num_joined, _is_joined, _has_failed
    timeout_s = max(timeout_s, by_torchrun.JOIN_TIMEOUT_S)
    world = _world(timeout_s)
    if _is_joined:
        raise MplabError(
            "this process has joined the others already: use the world that World.from_env() returned, or leave it "
            "with world.close() first"
        )
    if _num_joined == 0:
        atexit.register(_end)
    _num_joined += 1
    _has_failed = True  # until it has not
    rank = world.rank
    said = _gather(world, [by_torchrun._place(), _cores()], timeout_s)
    here = [r for r, (place, _) in enumerate(said) if place == said[rank][0]]
    members = [Member(*row) for row in _gather(world, by_torchrun._member(here.index(rank)), timeout_s)]
    by_torchrun.check_members(members)
    comm, request = world.Idup()
    _wait(request, timeout_s)
    _is_joined, _has_failed = True, False
    cores = {core for r in here for core in said[r][1]}
    return Joined(rank, members, len(cores), partial(MpiWire, comm))


def leave(has_failed: bool) -> None:
    """The world is closed; if it has failed and no other one follows, so have all processes."""
    global _is_joined, _has_failed
    _is_joined, _has_failed = False, has_failed


def _world(timeout_s: float) -> MPI.Comm:
    """All processes that were started together.

    MPI begins when all of them are here, and meanwhile no line of Python runs. So if one never comes, what says where
    this process was, and ends it, is not written in Python either.
    """
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MplabError(
            f"World.from_env() under mpirun needs mpi4py, which could not be imported ({error}): pip install mpi4py"
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    world, started = MPI.COMM_WORLD, next((os.environ[name] for name in SIZES if os.environ.get(name)), None)
    if started is not None and started != str(world.size):
        raise MplabError(
            f"{started} processes were started, and the MPI that mpi4py has found sees {world.size}: mpirun is another "
            f"MPI's; take the one that belongs to {MPI.Get_library_version().splitlines()[0]}"
        )
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise MplabError("MPI was initialised for one thread alone: leave mpi4py.rc.thread_level as it was")
    return world


def _gather(world: MPI.Comm, mine: object, timeout_s: float) -> list[Any]:
    """What each rank says. No collective does it, for none could name the ranks that are missing."""
    from mpi4py import MPI

    end_s, tag = time.monotonic() + timeout_s, FIRST_TAG + _num_joined % NUM_TAGS
    text, status = json.dumps(mine).encode(), MPI.Status()
    requests = [world.Isend(text, peer, tag) for peer in range(world.size) if peer != world.rank]
    said: dict[int, Any] = {world.rank: mine}
    while missing := [r for r in range(world.size) if r not in said]:
        for peer in missing:
            if message := world.Improbe(peer, tag, status):
                data = bytearray(status.Get_count(MPI.BYTE))
                _wait(message.Irecv(data), timeout_s)
                said[peer] = json.loads(data)
        if time.monotonic() > end_s:
            raise MplabError(
                f"{len(missing)} of {world.size} ranks did not join within {timeout_s:g} s: rank "
                f"{', '.join(map(str, missing))}; does each of them call World.from_env()?"
            )
        time.sleep(LOOK_EVERY_S)
    for request in requests:
        _wait(request, timeout_s)
    return [said[r] for r in range(world.size)]


def _wait(request: MPI.Request, timeout_s: float) -> None:
    """For all the others have come, and answer."""
    end_s = time.monotonic() + timeout_s
    while not request.Test():
        if time.monotonic() > end_s:
            raise MplabError(f"the ranks could not be connected within {timeout_s:g} s")
        time.sleep(LOOK_EVERY_S)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(rungs.num_cores()))


def _end() -> None:
    """At exit MPI waits for all processes: after a failure for those only that end as well, and then it ends all."""
    from mpi4py import MPI

    if not _has_failed or MPI.Is_finalized():
        return
    end_s, request = time.monotonic() + END_TIMEOUT_S, MPI.COMM_WORLD.Ibarrier()
    while not request.Test():
        if time.monotonic() > end_s:
            MPI.COMM_WORLD.Abort(1)
        time.sleep(LOOK_EVERY_S)
