"""Ratios against torch's own implementations, and the planner's predictions: `python -m mplab bench NAME [--json]`.

A benchmark is a module with a docstring, which says what is timed and how, and a function `run()`, which returns rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from importlib import import_module

from mplab.bench.common import Row, table
from mplab.world.machine import machine

BENCHMARKS = ("all_reduce", "data", "hybrid", "pipeline", "plans", "tensor", "world", "zero")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m mplab bench",
        description="Time this library beside torch's own, in one run; a ratio below 1: this library is faster.",
    )
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    module = import_module(f"mplab.bench.{arguments.name}")
    here = dataclasses.asdict(machine())  # before the benchmark adds to the load
    rows: list[Row] = module.run()
    if arguments.json:
        report = {"bench": arguments.name, "machine": here, "rows": [row.to_dict() for row in rows]}
        print(json.dumps(report, indent=2, allow_nan=False))
        return 0
    print(table(rows))
    print(f"\n{(module.__doc__ or '').strip()}\n")
    print(", ".join(f"{key} {value}" for key, value in here.items() if value))
    return 0
