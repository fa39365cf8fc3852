"""Gloo processes by fork, from one that has loaded torch: to load it in each takes longer than what most are asked.

For tests that do not care how their processes were started. That they start as everybody starts them, and what they
import then, is told by others.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import IO

# A first optimizer imports torch._dynamo, with sympy. pytest is for functions of tests that are called in processes.
LOADED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "mplab.bench",
    "pytest",
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(LOADED))


class Forked:
    """As much of `subprocess.Popen` as `GlooProcesses` uses, for the command python -c CODE ARGUMENTS."""

    def __init__(self, command: list[str], *, stderr: IO[str], env: dict[str, str], **_: object) -> None:
        (read_in, write_in), (read_out, write_out) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
        arguments = (command[2:], env, read_in, write_out, stderr.name)
        self._process = CONTEXT.Process(target=run, args=arguments, daemon=True)
        self._process.start()
        self.pid = self._process.pid
        self.stdin, self.stdout = os.fdopen(os.dup(write_in.fileno()), "w"), os.fdopen(os.dup(read_out.fileno()))
        for end in (read_in, write_in, read_out, write_out):
            end.close()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def run(command: list[str], env: dict[str, str], stdin: Connection, stdout: Connection, errors: str) -> None:
    """In the new process: as if Python had just been started with this command."""
    with open(errors, "a") as stderr:
        for number, file in enumerate((stdin, stdout, stderr)):
            os.dup2(file.fileno(), number)
    sys.stdin, sys.argv = os.fdopen(0), ["-c", *command[1:]]
    os.environ.update(env)
    sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
    exec(command[0], {})


SUBPROCESS = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
