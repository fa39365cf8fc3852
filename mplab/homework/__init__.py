"""Checks of the labs' exercises: the answer, and how it was reached."""

from __future__ import annotations

from collections.abc import Sequence

from mplab.homework.buckets import check_bucketed_backward as check_bucketed_backward
from mplab.homework.checks import check_pass_right as check_pass_right
from mplab.homework.checks import check_reduce_scatter as check_reduce_scatter
from mplab.homework.checks import check_ring_all_reduce as check_ring_all_reduce
from mplab.homework.checks import check_weighted_mean as check_weighted_mean
from mplab.homework.clip import check_clip_once as check_clip_once
from mplab.homework.cuts import check_optimal_cut as check_optimal_cut
from mplab.homework.mesh import check_mesh_groups as check_mesh_groups
from mplab.homework.microbatches import check_fastest_num_microbatches as check_fastest_num_microbatches
from mplab.homework.pipeline import check_one_f_one_b as check_one_f_one_b
from mplab.homework.plans import check_cheapest_plan as check_cheapest_plan
from mplab.homework.report import Line as Line
from mplab.homework.report import Report as Report
from mplab.homework.sampler import check_shard_sampler as check_shard_sampler
from mplab.homework.tensor import check_column_linear as check_column_linear
from mplab.homework.tensor import check_row_linear as check_row_linear
from mplab.homework.tensor import check_vocab_cross_entropy as check_vocab_cross_entropy
from mplab.homework.tensor_plan import check_plan_for as check_plan_for
from mplab.homework.unseen_model import make_unseen_model as make_unseen_model
from mplab.homework.zero import check_zero1_step as check_zero1_step


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m mplab check EXERCISE FILE`: check the function of that name in a Python file of your own."""
    from mplab.homework.command import main

    return main(argv)
