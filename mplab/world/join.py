"""How processes that a launcher started find each other: torchrun, or anything that sets the same variables."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from mplab.comm import fabric
from mplab.errors import MplabError
from mplab.world.parent import end_with_parent

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Processes of one launch start seconds apart, whatever time-out their messages have.
JOIN_TIMEOUT_S = 30.0
# A store that is there answers at once.
ANSWER_TIMEOUT_S = 8.0
LOOK_EVERY_S = 0.02
LOOK_THERE = "look at what was written there and by the launchers"


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
        MplabError: variables that make no sense, one of the others did not come, or GPUs are too few.
    """
    rank, size, local_rank, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise MplabError(f"RANK={rank} with WORLD_SIZE={size}: ranks go from 0 to {size - 1}")
    if dist.is_initialized():
        raise MplabError(
            "torch.distributed is initialised in this process already: use the world that World.from_env() returned, "
            "or leave it with world.close() first"
        )
    if os.environ.get("TORCHELASTIC_RUN_ID"):  # what else sets the variables may be a shell, which goes away
        end_with_parent()
    timeout_s = max(timeout_s, JOIN_TIMEOUT_S)
    return rank, _Work(lambda: _connect(rank, size, local_rank, port, timeout_s)).result()


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise MplabError(f"{name}={os.environ[name]!r} is no whole number: leave it to the launcher") from None


def _connect(rank: int, size: int, local_rank: int, port: int, timeout_s: float) -> list[Member]:
    server = _server(rank, size, port, timeout_s)
    try:
        members, store = _meet(rank, size, local_rank, server, timeout_s)
    except RuntimeError as error:
        if isinstance(error, MplabError):
            raise
        raise MplabError(f"rank {rank} lost {_address()} while it waited for the others: {error}") from error
    me = members[rank]
    check_members(members)
    _initialise(rank, members, store, timeout_s)
    if me.device.startswith("cuda"):
        with torch.cuda.device(me.device):
            fabric.connect(torch.device(me.device))
    return members


def _initialise(rank: int, members: list[Member], store: Any, timeout_s: float) -> None:
    """Connect torch.distributed."""
    device, size = members[rank].device, len(members)
    trouble = f"no answer within {timeout_s:g} s"
    with _loopback(len({m.place for m in members}) == 1):
        connected = _Work(
            lambda: dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
                store=PrefixStore("torch", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
        )
        # gloo listens where this host's name leads, and waits without end if that is no way for the others.
        if connected.ends_within(timeout_s + 1):
            try:
                return connected.result()
            except RuntimeError as error:
                trouble = str(error)
    raise MplabError(
        f"rank {rank} on {members[rank].host} met all {size} ranks at {_address()}, and could not connect to them "
        f"({trouble}): set GLOO_SOCKET_IFNAME on each host to its network device that reaches the others"
    )


def check_members(members: list[Member]) -> None:
    """Refuse processes that can't compute, or not together."""
    for r, member in enumerate(members):
        if member.trouble:
            raise MplabError(f"rank {r} on {member.host}: {member.trouble}")
    if len({member.device.split(":")[0] for member in members}) > 1:
        said = ", ".join(f"rank {r} {m.device} on {m.host}" for r, m in enumerate(members))
        raise MplabError(f"not all ranks have a GPU ({said}): set CUDA_VISIBLE_DEVICES= to run all on CPUs")


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _server(rank: int, size: int, port: int, timeout_s: float) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT: torchrun's own, or else rank 0's."""
    host, where = os.environ["MASTER_ADDR"], f"{_address()} (MASTER_ADDR:MASTER_PORT)"
    is_mine = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end_s = time.monotonic() + timeout_s
    while not is_mine and (trouble := _trouble(host, port)):
        if time.monotonic() > end_s:
            raise MplabError(f"rank {rank} could not reach {where} within {timeout_s:g} s: {trouble}")
        time.sleep(LOOK_EVERY_S)
    # If a stranger listens there, and says nothing, this never ends.
    opened = _Work(lambda: _my_store(host, port) if is_mine else _store(host, port, False, timeout_s))
    if not opened.ends_within(ANSWER_TIMEOUT_S):
        raise MplabError(
            f"rank {rank} reached {where}, and nobody there has answered within {ANSWER_TIMEOUT_S:g} s: another "
            "program may have this port; start all ranks with another --master-port, or port of --rdzv-endpoint"
        )
    try:
        return opened.result()
    except RuntimeError as error:
        raise MplabError(f"rank {rank} could not {'open' if is_mine else 'reach'} {where}: {error}") from error


def _store(host: str, port: int, is_mine: bool, timeout_s: float) -> Any:
    return TCPStore(host, port, None, is_mine, timedelta(seconds=timeout_s), wait_for_workers=False)


@cache
def _my_store(host: str, port: int) -> Any:
    """Rank 0's, which outlives its worlds as torchrun's does: others may look for the next one before the last ends."""
    return _store(host, port, True, JOIN_TIMEOUT_S)


def _trouble(host: str, port: int) -> str:
    """Why nobody can be reached there; empty if somebody can."""
    try:
        socket.create_connection((host, port), ANSWER_TIMEOUT_S).close()
    except OSError as error:
        return str(error)
    return ""


def _meet(rank: int, size: int, local_rank: int, server: Any, timeout_s: float) -> tuple[list[Member], Any]:
    """All processes that were started together, and a store that no others have written to.

    A launcher that starts them again keeps its store, with what the last ones wrote, and its number of restarts may
    differ between hosts. So rank 0 makes a name for them all, and each of the others asks for it by one of its own.
    """
    name, end_s = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank > 0:
        server.set(f"mplab/{rank}", name)
        if not _comes(server, [f"mplab/answer/{name}"], end_s):
            raise MplabError(f"rank 0 did not join at {_address()} within {timeout_s:g} s; {LOOK_THERE}")
        name = server.get(f"mplab/answer/{name}").decode()
    store, keys = PrefixStore(f"mplab/{name}", server), [str(r) for r in range(size)]
    store.set(keys[rank], json.dumps(_member(local_rank)))
    if not (_comes(store, keys, end_s) if rank > 0 else _answer(server, name, store, keys, end_s)):
        came = {r: Member(*json.loads(store.get(key))) for r, key in enumerate(keys) if store.check([key])}
        raise MplabError(_absence(came, size, timeout_s))
    return [Member(*json.loads(store.get(key))) for key in keys], store


def _comes(store: Any, keys: list[str], end_s: float) -> bool:
    """Wait until a store has all of these."""
    try:
        store.wait(keys, timedelta(seconds=max(1e-3, end_s - time.monotonic())))
    except dist.DistStoreError:
        return False
    return True


def _answer(server: Any, name: str, store: Any, keys: list[str], end_s: float) -> bool:
    """Tell the name to whoever asks for it, until all have come; what an earlier start asked is answered as well."""
    answered: set[str] = set()
    while not store.check(keys):
        if time.monotonic() > end_s:
            return False
        for key in keys[1:]:
            asked = server.get(f"mplab/{key}").decode() if server.check([f"mplab/{key}"]) else ""
            if asked and asked not in answered:
                server.set(f"mplab/answer/{asked}", name)
                answered.add(asked)
        time.sleep(LOOK_EVERY_S)
    return True


def _absence(came: dict[int, Member], size: int, timeout_s: float) -> str:
    """Who did not join, and who did."""
    num_local, num_nodes = (int(os.environ.get(f"{name}_WORLD_SIZE", 0)) for name in ("LOCAL", "GROUP"))
    missing = [str(r) for r in range(size) if r not in came]
    if num_local * num_nodes == size and num_nodes > 1:  # torchrun's, and as many on each
        missing = [f"{r} (of node {int(r) // num_local})" for r in missing]
    here = ", ".join(f"rank {r} on {member.host}" for r, member in came.items())
    return (
        f"{len(missing)} of {size} ranks did not join at {_address()} within {timeout_s:g} s: rank "
        f"{', '.join(missing)}; {here} did. {LOOK_THERE}"
    )


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


class _Work(Generic[T]):
    """Something that would ignore Ctrl-C, or never end, done in another thread."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._results: list[T] = []
        self._errors: list[BaseException] = []

        def call() -> None:
            try:
                self._results.append(work())
            except BaseException as error:
                self._errors.append(error)

        self._thread = threading.Thread(target=call, daemon=True, name="mplab-join")
        self._thread.start()

    def ends_within(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> T:
        while not self.ends_within(0.1):
            pass
        if self._errors:
            raise self._errors[0]
        return self._results[0]
