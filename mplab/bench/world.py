"""From the call to the first result: a world of thread ranks beside torch's and accelerate's ways to start processes.

The result is an all-reduce of one number that every rank has; processes do it over gloo, with one thread each.
Every side of every round starts in a fresh Python process that has imported torch. "first" is the first run of a world
in that process, "warm" the median of the runs after it; the others start anew each time, and are held against both.
A peer's time ends when its last rank has the sum, ours when `run` has returned it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from mplab.bench.common import Row, compare, paired, skipped
from mplab.errors import MplabError

NUM_RANKS = (2, 4)
NUM_ROUNDS = 5
PEERS = ("mp.spawn", "torchrun", "notebook_launcher")
TIMEOUT_S = 120.0
GRACE_S = 3.0
SCRIPT = Path(__file__).with_name("launchers.py")


def run(num_ranks: Sequence[int] = NUM_RANKS, num_rounds: int = NUM_ROUNDS, peers: Sequence[str] = PEERS) -> list[Row]:
    """Every number of ranks against every peer.

    Args:
        num_ranks: sizes of the world.
        num_rounds: rounds of each.
        peers: some of `PEERS`.
    """
    rows = []
    for n in num_ranks:
        warm_s: list[float] = []
        here = [peer for peer in peers if peer != "notebook_launcher" or find_spec("accelerate")]
        sides = [partial(_first_s, n, warm_s), *(partial(_peer_s, peer, n) for peer in here)]
        first_s, *peers_s = paired(*sides, num_rounds=num_rounds, name=f"{n} ranks")
        for name, ours_s in (("first", first_s), ("warm", warm_s)):
            rows += [compare(f"{n} ranks, {name}", p, ours_s, peer_s) for p, peer_s in zip(here, peers_s, strict=True)]
            rows += [skipped(f"{n} ranks, {name}", p, "accelerate is not installed") for p in peers if p not in here]
    return rows


def _first_s(num_ranks: int, warm_s: list[float]) -> float:
    """Our first run; the median of the warm ones after it goes to a list of its own."""
    times = launch([sys.executable, str(SCRIPT)], "mplab", num_ranks)
    warm_s.append(times["warm_s"])
    return (times["0"] - times["start"]) * 1e-9


def _peer_s(peer: str, num_ranks: int) -> float:
    command = [sys.executable, str(SCRIPT)]
    if peer == "torchrun":
        launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)
        command = [sys.executable, *launcher, str(SCRIPT)]
    times = launch(command, peer, num_ranks)
    return (max(times[str(r)] for r in range(num_ranks)) - times["start"]) * 1e-9


def launch(command: Sequence[str], how: str, num_ranks: int) -> dict[str, float]:
    """Run the script in one way; nothing that it starts outlives this call.

    Returns:
        The numbers that it left.

    Raises:
        MplabError: it failed, with the end of what it wrote, or took longer than `TIMEOUT_S`.
    """
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    # Without PYTHONSAFEPATH this folder's files would be top-level modules for a script in it.
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="mplab-", ignore_cleanup_errors=True) as folder:
        start_ns = time.perf_counter_ns()
        with Path(folder, "output").open("wb") as output:
            process = subprocess.Popen(
                [*command, how, str(num_ranks), folder],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # a group of its own, so that all of it can be ended
            )
        try:
            why = f"ended with status {process.wait(TIMEOUT_S)}"
        except subprocess.TimeoutExpired:
            why = f"took longer than {TIMEOUT_S:g} s"
        finally:
            end(process)
        if process.returncode != 0:
            said = Path(folder, "output").read_text("utf-8", "replace")[-2000:]
            raise MplabError(f"{how} with {num_ranks} ranks {why}: {said}")
        left = {p.name: p.read_text("utf-8") for p in Path(folder).iterdir() if p.name not in ("output", "store")}
        return {"start": start_ns} | {name: float(text) for name, text in left.items()}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, gently first: torchrun's workers lead groups of their own, and only it ends them."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
