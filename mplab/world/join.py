"""How processes that a launcher started find each other: torchrun, or anything that sets the same variables."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from mplab.comm import fabric
from mplab.errors import MplabError

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Processes of one launch start seconds apart, whatever time-out their messages have.
JOIN_TIMEOUT_S = 30.0

_num_joined = 0  # worlds that this process has joined: each has its own names in the store


class Member(NamedTuple):
    """What each process tells the others when it joins.

    Args:
        host: its host's name.
        place: tells hosts of the same name apart, and network namespaces of one host.
        device: where it computes.
        trouble: why it cannot; empty if it can.
    """

    host: str
    place: str
    device: str
    trouble: str


def join(timeout_s: float) -> tuple[int, list[Member]]:
    """Join the other processes: this one's rank, and all of them in rank order. torch.distributed is connected then.

    Args:
        timeout_s: how long to wait for them, but at least 30 s.

    Raises:
        MplabError: no launcher started this process, one of the others did not come, or GPUs are too few.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise MplabError(
            f"World.from_env() needs a launcher, which would have set {', '.join(missing)}: start the script with "
            "`torchrun --nproc-per-node=2 script.py`, or use World(n) for ranks in this process"
        )
    rank, size, local_rank, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise MplabError(f"RANK={rank} with WORLD_SIZE={size}: ranks go from 0 to {size - 1}")
    if dist.is_initialized():
        raise MplabError(
            "torch.distributed is initialised in this process already: use the world that World.from_env() returned, "
            "or leave it with world.close() first"
        )
    timeout_s = max(timeout_s, JOIN_TIMEOUT_S)
    return rank, _interruptibly(lambda: _connect(rank, size, local_rank, port, timeout_s))


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise MplabError(f"{name}={os.environ[name]!r} is no whole number: leave it to the launcher") from None


def _connect(rank: int, size: int, local_rank: int, port: int, timeout_s: float) -> list[Member]:
    global _num_joined
    _num_joined += 1
    prefix = f"mplab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_num_joined}"
    server = PrefixStore(prefix, _server(rank, size, port, timeout_s))
    members = _gather(rank, size, local_rank, server, timeout_s)
    me = members[rank]
    for r, member in enumerate(members):
        if member.trouble:
            raise MplabError(f"rank {r} on {member.host}: {member.trouble}")
    if len({member.device.split(":")[0] for member in members}) > 1:
        said = ", ".join(f"rank {r} {m.device} on {m.host}" for r, m in enumerate(members))
        raise MplabError(f"not all ranks have a GPU ({said}): set CUDA_VISIBLE_DEVICES= to run all on CPUs")
    with _loopback(len({m.place for m in members}) == 1):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if me.device.startswith("cuda") else "gloo",
            store=PrefixStore("torch", server),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
    if me.device.startswith("cuda"):
        with torch.cuda.device(me.device):
            fabric.connect(torch.device(me.device))
    return members


def _server(rank: int, size: int, port: int, timeout_s: float) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT: torchrun's own, or else rank 0's."""
    host = os.environ["MASTER_ADDR"]
    is_mine = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(host, port, size, is_mine, timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        what = "open" if is_mine else f"reach within {timeout_s:g} s"
        raise MplabError(f"rank {rank} could not {what} {host}:{port} (MASTER_ADDR:MASTER_PORT): {error}") from error


def _gather(rank: int, size: int, local_rank: int, store: Any, timeout_s: float) -> list[Member]:
    keys = [f"member/{r}" for r in range(size)]
    store.set(keys[rank], json.dumps(_member(local_rank)))
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [str(r) for r, key in enumerate(keys) if not store.check([key])]
        raise MplabError(
            f"{len(missing)} of {size} ranks did not join at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within {timeout_s:g} s: rank {', '.join(missing)}; look at what was written there and by the launchers"
        ) from error
    return [Member(*json.loads(store.get(key))) for key in keys]


def _member(local_rank: int) -> Member:
    host, place = socket.gethostname(), _place()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus == 0:
        return Member(host, place, "cpu", "")
    if local_rank < num_gpus:
        return Member(host, place, f"cuda:{local_rank}", "")
    trouble = (
        f"LOCAL_RANK={local_rank}, but this host has {num_gpus} GPU{'s' * (num_gpus > 1)}: start at most one process "
        "for each GPU, or set CUDA_VISIBLE_DEVICES= to run all on CPUs"
    )
    return Member(host, place, "", trouble)


def _place() -> str:
    """Equal in two processes if they share a clock and a loopback device; names of hosts may repeat."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return hex(uuid.getnode())


@contextmanager
def _loopback(is_wanted: bool) -> Iterator[None]:
    """While gloo connects ranks of one host, it listens there alone, unless the user chose another network."""
    name, device = "GLOO_SOCKET_IFNAME", {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if not is_wanted or device is None or name in os.environ:
        yield
        return
    os.environ[name] = device
    try:
        yield
    finally:
        del os.environ[name]


def _interruptibly(work: Callable[[], T]) -> T:
    """Do something that would ignore Ctrl-C, in another thread."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True, name="mplab-join")
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results[0]
