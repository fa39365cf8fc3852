"""`python -m mplab COMMAND`: each command lives in the room it belongs to and is imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mplab.errors import MplabError

COMMANDS = {
    "probe": ("mplab.world.probe", "measure this machine: cores, GPUs, memory, FLOP/s, links"),
    "train": ("mplab.parallel.train", "train a GPT on text, or an MLP on digits"),
    "bench": ("mplab.bench", "compare with torch's own: bench NAME"),
    "check": ("mplab.homework", "check an exercise in a file, as the labs do: check EXERCISE FILE"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its own arguments; None takes those of the process.

    Returns:
        The exit status: 0 when all went well, 2 after a user's mistake (stderr says which), 130 after Ctrl-C, 141 when
        nobody reads the output any more.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"mplab: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        status: int = import_module(COMMANDS[name][0]).main(rest)
        return status
    except MplabError as error:
        print(f"mplab {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mplab {name}: stopped", file=sys.stderr)
        return 130


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<8}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: python -m mplab COMMAND [OPTIONS]; COMMAND --help has its options", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
