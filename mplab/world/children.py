"""Processes that talk over gloo: what thread ranks are measured against, and a link of its own.

They are plain child processes that take commands from a pipe, so that they idle while something else is timed, and
need no `if __name__ == "__main__"` of whoever starts them. A child whose pipe closes is gone: none outlives its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from mplab.errors import MplabError

TIMEOUT_S = 30
GRACE_S = 2.0


class GlooProcesses:
    """`with GlooProcesses(2) as gloo:` starts 2 processes with one thread each, connected by torch.distributed.

    Args:
        num_ranks: how many.

    Raises:
        MplabError: they could not be started or connected; says what they wrote.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.processes: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="mplab-", ignore_cleanup_errors=True)

    def __enter__(self) -> GlooProcesses:
        folder = Path(self._folder.name)
        code = "from mplab.world.children import serve; serve()"
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
        try:
            with (folder / "errors").open("w") as errors:
                for rank in range(self.num_ranks):
                    command = [sys.executable, "-c", code, str(rank), str(self.num_ranks), str(folder / "store")]
                    self.processes.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE,
                            stderr=errors,
                            text=True,
                            env=os.environ | {"PYTHONPATH": paths},
                        )
                    )
            self._replies()
        except BaseException:
            self.close()
            raise
        return self

    def call(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `fn(rank, *args)` in every process.

        Args:
            fn: a function of a module; what it returns must go through JSON, as must its arguments.
            args: passed on.

        Returns:
            What each returned, in rank order.

        Raises:
            MplabError: one of them raised, with its traceback.
        """
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it is gone: its missing reply says so
                process.stdin.write(json.dumps([fn.__module__, fn.__qualname__, args]) + "\n")
                process.stdin.flush()
        return self._replies()

    def _replies(self) -> list[Any]:
        """One reply of each process. One that fails ends, which ends the others' waiting for it."""
        replies, errors = [], []
        for rank, process in enumerate(self.processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            reply = json.loads(line) if line else {"error": f"it ended with status {process.wait(GRACE_S)}"}
            if "error" in reply:
                errors.append(f"gloo process {rank} of {self.num_ranks}: {reply['error']}")
            replies.append(reply.get("result"))
        if errors:
            said = (Path(self._folder.name) / "errors").read_text("utf-8", "replace")[-2000:]
            raise MplabError("\n".join([*errors, said]).strip())
        return replies

    def close(self) -> None:
        """End them all, whatever they do."""
        for process in self.processes:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        for process in self.processes:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def serve() -> None:
    """What a child runs: commands from stdin, one JSON line each, and a reply line for each to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    rank, num_ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # gloo writes to stdout, too
    commands: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if loopback := {"linux": "lo", "darwin": "lo0"}.get(sys.platform):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        timeout = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("gloo", f"file://{store}", timeout, num_ranks, rank)
        dist.barrier()
        result: Any = "ready"
        while True:
            replies.write(json.dumps({"result": result}) + "\n")
            module, name, args = commands.get()
            result = getattr(import_module(module), name)(rank, *args)
    except BaseException:
        import traceback

        replies.write(json.dumps({"error": traceback.format_exc()}) + "\n")
        replies.flush()
        os._exit(1)


def _listen(commands: SimpleQueue[Any]) -> None:
    """Pass commands on; when the parent is gone, so is this process, wherever it waits."""
    for line in sys.stdin:
        commands.put(json.loads(line))
    os._exit(0)
