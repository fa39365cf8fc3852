"""Run the project's checks in order, all of them even when one fails, and say where the time went.

python tools/check.py [linters] [tests] [--since UNIX_SECONDS]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NUM_WORKERS = 2  # with a third one, processes of two cores wait for each other past their deadlines
STEPS: dict[str, list[list[str]]] = {
    "linters": [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["mypy"],
        ["lint-imports"],
    ],
    # The labs, too: a file at a time on each of the workers, in the order that tests/conftest.py puts them in.
    "tests": [
        [
            *("pytest", "--nbval", "tests", "labs", f"--numprocesses={NUM_WORKERS}", "--dist=loadfile"),
            *("--no-loadscope-reorder", "--durations=25", "--durations-min=1"),
        ]
    ],
}


def main() -> int:
    """Run the chosen steps; the exit status is 1 when any of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--since", type=int, help="when the set-up began, as `date +%%s` says it")
    arguments = parser.parse_args()
    unknown = set(arguments.steps) - set(STEPS)
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}: there are {', '.join(STEPS)}")

    rows = []
    if arguments.since is not None:
        rows.append(("set-up", time.time() - arguments.since, True))
    for step in arguments.steps or STEPS:
        start_s = time.monotonic()
        passed = True
        for command in STEPS[step]:
            print("$", *command, flush=True)
            passed &= subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, check=False).returncode == 0
        rows.append((step, time.monotonic() - start_s, passed))

    print("\nWhere the time went")
    for name, duration_s, passed in rows:
        print(f"  {name:<8} {duration_s:6.1f} s  {'passed' if passed else 'FAILED'}")
    print(f"  {'in all':<8} {sum(duration_s for _, duration_s, _ in rows):6.1f} s")
    return 0 if all(passed for *_, passed in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
