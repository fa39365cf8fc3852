"""The benchmark of tensor parallelism: every row, the faster of DTensor's plans, and nothing timed that isn't alike."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from bench_clock import check_stamps
from torch import nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from mplab import MplabError, Rank, World
from mplab.bench import tensor, torch_tensor
from mplab.bench.common import Row
from mplab.bench.tensor import CASES, Case
from mplab.bench.torch_data import NUM_LAYERS, NUM_RANKS, Size
from mplab.bench.torch_tensor import GPT_PLANS, SEQUENCE_PLANS
from mplab.parallel import Serial

TINY = Size(width=8, sequence=8, batch_size=4)
GPT_SIDES = ["GPT, one process", "GPT, gloo processes", "GPT, sequence parallel", "GPT, one thread", "GPT"]


def named(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.case, row.peer) for row in rows]


def test_cases_are_named_by_their_sizes() -> None:
    assert [CASES[f"GPT {name}"].size.width for name in ("medium", "small", "tiny")] == [256, 128, 64]
    for name, case in CASES.items():
        assert name.startswith(case.kind)
        assert case.kind == "GPT" or name == f"MLP {case.size.width}"


class Known:
    """Neither processes nor clocks: all that is checked is right, and all times are given.

    Args:
        seconds: one list for each side of "GPT", ours first, then DTensor's plans.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[list[float]] | None = None) -> None:
        self.expected = tensor.one_process("GPT", TINY, 1).losses()
        self.checked: list[str] = []
        num_bytes = tensor.parameter_bytes("GPT", TINY)
        for side in (tensor.DTensor, tensor.Processes):
            monkeypatch.setattr(side, "losses", lambda self_: self.expected)
        monkeypatch.setattr(tensor.DTensor, "parameter_bytes", lambda self_: num_bytes)
        monkeypatch.setattr(tensor, "GlooProcesses", nullcontext)
        monkeypatch.setattr(tensor, "paired", lambda *sides, **_: seconds or pytest.fail("timed"))

    def run(self) -> list[Row]:
        return tensor.run({"GPT": Case("GPT", TINY, True)}, 3, 1)


@pytest.mark.parametrize("fastest", [0, 1])
def test_ours_is_held_against_the_faster_of_its_plans(monkeypatch: pytest.MonkeyPatch, fastest: int) -> None:
    ours = [[1.0, 2.0, 3.0], [4.0] * 3, [5.0, 6.0, 7.0], [8.0] * 3, [9.0] * 3]  # in the order of GPT_SIDES
    fast, slow = [10.0, 20.0, 90.0], [1.0, 30.0, 40.0]  # the median counts: neither the mean nor the best
    fast_sequence, slow_sequence = [50.0] * 3, [60.0] * 3
    plans = (
        [[fast, slow], [slow_sequence, fast_sequence]]
        if not fastest
        else [[slow, fast], [fast_sequence, slow_sequence]]
    )
    rows = Known(monkeypatch, [*ours, *plans[0], *plans[1]]).run()
    of_case = {(row.case, row.peer): row for row in rows}
    for case, seconds in zip(GPT_SIDES, ours, strict=True):
        row = of_case[case, "DTensor"]
        ratios = sorted(a / b for a, b in zip(seconds, fast, strict=True))
        assert row.ratio == pytest.approx(ratios[1])
        assert row.extra == {"ours_s": seconds[1], "peer_s": 20.0, "peer_plan": GPT_PLANS[fastest]}
    assert of_case["GPT", "one thread"].extra == {"ours_s": 9.0, "peer_s": 8.0}
    assert of_case["GPT, sequence parallel", "DTensor, sequence parallel"].extra == {
        "ours_s": 6.0,
        "peer_s": 50.0,
        "peer_plan": SEQUENCE_PLANS[1 - fastest],
    }


def test_every_side_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(monkeypatch, [[1.0] * 3] * 9)
    peers = [f"DTensor ({plan}) GPT" for plan in (*GPT_PLANS, *SEQUENCE_PLANS)]
    losses, parts = list[str](), list[str]()
    monkeypatch.setattr(tensor, "check", lambda who, *_: losses.append(who))
    monkeypatch.setattr(tensor, "check_bytes", lambda who, *_: parts.append(who))
    known.run()
    assert losses == GPT_SIDES + peers
    assert parts == peers


@pytest.mark.parametrize(
    ("wrong", "who"),
    [
        (tensor.DTensor, r"DTensor \(whole logits\) GPT"),
        (tensor.Threads, "GPT, sequence parallel"),
        (tensor.Processes, "GPT, gloo processes"),
    ],
)
def test_nothing_is_timed_that_trains_otherwise(monkeypatch: pytest.MonkeyPatch, wrong: type, who: str) -> None:
    known = Known(monkeypatch)
    losses = [*known.expected[:2], known.expected[2] + 0.01]
    monkeypatch.setattr(wrong, "losses", lambda self: losses)
    with pytest.raises(MplabError, match=f"^{who}: its losses .* are not one process's"):
        known.run()


def test_nothing_is_timed_that_is_not_cut_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(monkeypatch)
    whole = 4 * sum(p.numel() for p in torch_tensor.model("GPT", TINY).parameters())
    monkeypatch.setattr(tensor.DTensor, "parameter_bytes", lambda self: [whole, whole])
    with pytest.raises(MplabError, match=rf"DTensor \(whole logits\) GPT: its ranks have \[{whole}, {whole}\] bytes"):
        known.run()


def test_a_gradient_that_is_too_large_shows_in_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(monkeypatch)
    monkeypatch.setattr(tensor, "LEARNING_RATE", 2 * tensor.LEARNING_RATE)
    with pytest.raises(MplabError, match=r"^GPT, sequence parallel: its losses"):
        known.run()


@pytest.mark.parametrize("kind", ["GPT", "MLP"])
def test_bytes_by_hand(kind: str) -> None:
    width, vocabulary = TINY.width, 256
    norm, mlp_cut, mlp_bias = 2 * width, 8 * width**2 + 4 * width, width
    attention_cut, attention_bias = 4 * width**2 + 3 * width, width
    if kind == "MLP":
        cut, whole = mlp_cut, norm + mlp_bias
    else:
        cut = NUM_LAYERS * (mlp_cut + attention_cut) + 2 * vocabulary * width
        whole = NUM_LAYERS * (2 * norm + mlp_bias + attention_bias) + norm + TINY.sequence * width
    assert cut + whole == sum(p.numel() for p in torch_tensor.model(kind, TINY).parameters())
    assert tensor.parameter_bytes(kind, TINY) == [4 * (cut // NUM_RANKS + whole)] * NUM_RANKS


def messages(kind: str, sequence_parallel: bool) -> list[str]:
    """What rank 0 calls in the second step."""

    def of_rank(rank: Rank) -> list[str]:
        engine = tensor.tensor_parallel(kind, sequence_parallel, rank, TINY)
        engine.step(torch_tensor.batch("GPT", TINY))  # not the one that it trains on
        before = len(rank.comm.ledger.messages)
        engine.step(torch_tensor.batch("GPT", TINY))
        return [message.op for message in rank.comm.ledger.messages[before:]]

    return World(NUM_RANKS, "cpu").run(of_rank)[0]


def test_an_mlp_is_between_other_layers() -> None:
    """Its input has a gradient, which is what the all-reduce of a column-parallel layer is for."""
    assert messages("MLP", sequence_parallel=False) == ["all_reduce_", "all_reduce"]


def test_each_side_is_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reduce_scatter" not in messages("GPT", sequence_parallel=False)
    assert messages("GPT", sequence_parallel=True).count("reduce_scatter") > 4 * NUM_LAYERS
    known, made, of_rank = Known(monkeypatch, [[1.0] * 3] * 9), list[bool](), tensor.tensor_parallel

    def remember(kind: str, sequence_parallel: bool, rank: Rank, size: Size) -> tensor.OwnBatch:
        if rank.index == 0:
            made.append(sequence_parallel)
        return of_rank(kind, sequence_parallel, rank, size)

    num_threads, alone = list[int](), tensor.one_process

    def remember_alone(kind: str, size: Size, num: int) -> tensor.OneProcess:
        num_threads.append(num)
        return alone(kind, size, num)

    monkeypatch.setattr(tensor, "tensor_parallel", remember)
    monkeypatch.setattr(tensor, "one_process", remember_alone)
    known.run()
    assert made == [True, False, False]  # the last one for its bytes
    assert num_threads == [NUM_RANKS, 1, 1]  # the last one for the losses


@pytest.mark.parametrize("num_threads", [1, 2])
def test_one_process_has_its_threads_while_it_is_timed(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    seen: list[int] = []

    def step(self: Serial, batch: object) -> float:
        seen.append(torch.get_num_threads())
        return 0.0

    before = torch.get_num_threads()
    monkeypatch.setattr(Serial, "step", step)
    tensor.one_process("MLP", TINY, num_threads).step_s(2)
    assert seen == [num_threads] * 3
    assert torch.get_num_threads() == before


# -- torch's side ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GPT_PLANS, *SEQUENCE_PLANS])
def test_a_plan_names_every_layer(name: str) -> None:
    modules = dict(torch_tensor.model("GPT", TINY).named_modules())
    plan = torch_tensor.plan_of("GPT", name, NUM_LAYERS)
    assert plan.keys() <= modules.keys()
    linear = {path for path, module in modules.items() if isinstance(module, nn.Linear)}
    for path in linear:
        assert isinstance(plan[path], RowwiseParallel if path.endswith(("output", "down")) else ColwiseParallel)
    assert isinstance(plan["embedding.token"], RowwiseParallel)
    assert plan["head.projection"].use_local_output == (not name.endswith("loss_parallel"))
    # One message for the gradient of what query, key and value read.
    assert all(isinstance(plan[f"blocks.{i}.attention"], PrepareModuleInput) for i in range(NUM_LAYERS))
    norms = {path for path, module in modules.items() if isinstance(module, nn.LayerNorm)}
    others = {path: plan[path] for path in norms | {"embedding.position"} if path in plan}
    if name in SEQUENCE_PLANS:
        assert isinstance(others.pop("embedding.position"), PrepareModuleOutput)
        assert others.keys() == norms
        assert all(isinstance(style, SequenceParallel) for style in others.values())
    else:
        assert not others


def test_times_of_a_process_begin_after_a_step_and_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    check_stamps(torch_tensor, lambda: torch_tensor.stamps(0, "whole logits", "GPT", [*TINY], 2), monkeypatch)
