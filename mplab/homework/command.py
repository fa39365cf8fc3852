"""`python -m mplab check EXERCISE FILE`: the check of an exercise that was written in a file."""

from __future__ import annotations

import argparse
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mplab.errors import MplabError
from mplab.homework import checks
from mplab.homework.buckets import check_bucketed_backward
from mplab.homework.clip import check_clip_once
from mplab.homework.cuts import check_optimal_cut
from mplab.homework.mesh import check_mesh_groups
from mplab.homework.microbatches import check_fastest_num_microbatches
from mplab.homework.pipeline import check_one_f_one_b
from mplab.homework.plans import check_cheapest_plan
from mplab.homework.report import Report
from mplab.homework.sampler import check_shard_sampler
from mplab.homework.tensor import check_column_linear, check_row_linear, check_vocab_cross_entropy
from mplab.homework.tensor_plan import check_plan_for
from mplab.homework.zero import check_zero1_step

CHECKS: dict[str, Callable[..., Report]] = {
    "pass_right": checks.check_pass_right,
    "weighted_mean": checks.check_weighted_mean,
    "ring_all_reduce": checks.check_ring_all_reduce,
    "reduce_scatter": checks.check_reduce_scatter,
    "bucketed_backward": check_bucketed_backward,
    "zero1_step": check_zero1_step,
    "shard_sampler": check_shard_sampler,
    "one_f_one_b": check_one_f_one_b,
    "optimal_cut": check_optimal_cut,
    "fastest_num_microbatches": check_fastest_num_microbatches,
    "column_linear": check_column_linear,
    "row_linear": check_row_linear,
    "vocab_cross_entropy": check_vocab_cross_entropy,
    "plan_for": check_plan_for,
    "mesh_groups": check_mesh_groups,
    "cheapest_plan": check_cheapest_plan,
    "clip_once": check_clip_once,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 0 when all checks passed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m mplab check", description="Check an exercise.")
    parser.add_argument("exercise", choices=CHECKS, metavar="EXERCISE", help=f"one of {', '.join(CHECKS)}")
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="the Python file that defines a function of this name; it is run"
    )
    arguments = parser.parse_args(argv)
    if not arguments.file.is_file():
        raise MplabError(f"{arguments.file} is no file: give the path of the Python file with {arguments.exercise}")
    solution = run_file(arguments.file).get(arguments.exercise)
    if not callable(solution):
        raise MplabError(f"{arguments.file} defines no function {arguments.exercise}: it is what the exercise asks for")
    report = CHECKS[arguments.exercise](solution)
    print(report)
    return 0 if report.passed else 1


def run_file(path: Path) -> dict[str, Any]:
    """What a learner's file defines.

    Raises:
        MplabError: it does not run to its end. One that calls `exit()` does not either: its status would pass for the
            report's.
    """
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        what = str(error)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines, what = [error.lineno], error.msg
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise MplabError(f"{where}: {type(error).__name__}: {what}; mend it, for the file is run first") from None
