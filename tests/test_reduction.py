"""Reductions in rank order, with every way in which the result may lie in one of the inputs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conformance.values import DTYPES, OPS, assert_same, given, has_meaning, plain

from mplab import MplabError, World
from mplab.comm import reduction
from mplab.comm.reduction import check_op, reduce_in_order

CPU = torch.device("cpu")


@pytest.fixture(params=[1 << 20, 64], ids=["one block", "many blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(reduction, "BLOCK_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", range(1, 9))
def test_equals_the_plain_reduction(n: int, op: str, block_bytes: int) -> None:
    for dtype in DTYPES:
        if not has_meaning(op, dtype):
            continue
        for length in (0, 1, 7, 100):
            xs = [given(r, length, dtype, CPU) for r in range(n)]
            before = [x.clone() for x in xs]
            out = torch.empty(length, dtype=dtype)
            reduce_in_order(op, xs, out)
            assert_same(out, plain(op, before), f"{op} of {n} x {length} {dtype}")
            for x, was in zip(xs, before, strict=True):
                assert_same(x, was, "an input")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", range(1, 9))
def test_the_result_may_lie_in_any_input(n: int, op: str, block_bytes: int) -> None:
    for place in range(n):
        for length in (0, 1, 7, 100):
            xs = [given(r, length, torch.float64, CPU) + 0.1 * r for r in range(n)]
            before = [x.clone() for x in xs]
            reduce_in_order(op, xs, xs[place])
            assert_same(xs[place], plain(op, before), f"{op} into input {place} of {n}")
            for i in range(n):
                if i != place:
                    assert_same(xs[i], before[i], f"input {i}")


def test_the_sum_is_taken_in_rank_order() -> None:
    """1e20 + 1 - 1e20 is 0 from left to right and 1 in any order that cancels first."""
    for xs, want in (([1e20, 1.0, -1e20], 0.0), ([1e20, -1e20, 1.0], 1.0)):
        out = torch.empty(1, dtype=torch.float64)
        reduce_in_order("sum", [torch.tensor([x], dtype=torch.float64) for x in xs], out)
        assert out.item() == want


@pytest.mark.parametrize("op", ["avg", ["sum"]])
def test_an_unknown_operation_is_refused_with_the_known_ones(op: Any) -> None:
    with pytest.raises(MplabError, match=rf"op={re.escape(repr(op))} is no reduction.*'sum', 'mean', 'product', 'max'"):
        check_op(op, torch.float32)
    with pytest.raises(MplabError, match="is no reduction"):
        World(1, "cpu").run(lambda rank: rank.comm.all_reduce(torch.ones(2), op))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_the_mean_of_whole_numbers_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(MplabError, match=rf"mean of {dtype}.*op='sum'"):
        check_op("mean", dtype)


@pytest.mark.parametrize("op", ["max", "min"])
def test_complex_numbers_have_no_order(op: str) -> None:
    with pytest.raises(MplabError, match=f"op='{op}'.*complex64"):
        check_op(op, torch.complex64)


def test_all_else_is_allowed() -> None:
    for op in OPS:
        for dtype in DTYPES:
            if has_meaning(op, dtype):
                check_op(op, dtype)
