"""The benchmark of hybrid parallelism: every mesh beside torch's, and nothing timed that isn't alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_clock import check_stamps
from forked import SUBPROCESS
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import MplabError
from mplab.bench import hybrid, torch_hybrid
from mplab.bench.common import Row
from mplab.bench.hybrid import CASES, SIZES
from mplab.bench.torch_data import NUM_LAYERS, Size, gpt
from mplab.bench.torch_hybrid import DATA_PARALLEL, NUM_RANKS
from mplab.bench.torch_tensor import GPT_PLANS
from mplab.models.gpt import Block
from mplab.parallel import Serial
from mplab.plan.layout import Plan
from mplab.world import children
from mplab.world.children import GlooProcesses

TINY = Size(width=8, sequence=8, batch_size=8)
NAMES = [f"{name} tiny" for name in CASES]
EVERY_PEER = [(name, peer) for name, case in CASES.items() for peer in case.peers]


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooProcesses]:
    """Processes that find this file, too, for all tests: they keep what they have trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "subprocess", SUBPROCESS)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with GlooProcesses(NUM_RANKS) as processes:
            yield processes


def test_cases_are_the_meshes_that_they_are_called() -> None:
    for name, (plan, peers) in CASES.items():
        axes = {"dp": plan.dp, "pp": plan.pp, "tp": plan.tp}
        assert [axis for axis, degree in axes.items() if degree == 2] == name.split("×")
        assert plan.num_ranks == NUM_RANKS
        assert plan.schedule == "1f1b"
        assert plan.num_microbatches == (4 if plan.pp > 1 else 1)
        assert len(set(peers)) == (len(DATA_PARALLEL) if plan.dp > 1 else 1) * (len(GPT_PLANS) if plan.tp > 1 else 1)
        for peer in peers:
            assert peer.startswith(DATA_PARALLEL) == (plan.dp > 1)
            assert peer.endswith(GPT_PLANS) == (plan.tp > 1)
        for size in SIZES.values():
            assert size.batch_size % (plan.dp * plan.num_microbatches) == 0  # as torch needs it, for the mean of means


def test_every_mesh_beside_its_peers(monkeypatch: pytest.MonkeyPatch, gloo: GlooProcesses) -> None:
    """Which checks, too, that all of torch's compositions train as one process does."""
    monkeypatch.setattr(hybrid, "GlooProcesses", lambda num_ranks: nullcontext(gloo))
    rows = hybrid.run({"tiny": TINY}, num_rounds=1, num_steps=1)
    assert [(row.case, row.peer) for row in rows] == [(n, peer) for n in NAMES for peer in ("torch", "one process")]
    for row in rows:
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.runs == 1
        assert row.extra.keys() == {"ours_s", "peer_s"} | ({"peer_plan"} if row.peer == "torch" else set())
        if row.peer == "torch":
            assert row.extra["peer_plan"] in CASES[row.case.removesuffix(" tiny")].peers


# -- without processes ------------------------------------------------------------------------------------------------


class Known:
    """Neither processes nor clocks: all that is checked of torch's is right, and all times are given.

    Args:
        seconds: of one process, ours, and each peer of a case.
        has_ranks: ours are real; else all that is checked of them is right, too.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: list[list[float]] | None = None, has_ranks: bool = True
    ) -> None:
        self.expected = hybrid.OneProcess(gpt(TINY), hybrid.batch(TINY), hybrid.NUM_CHECKED).losses()
        for side in (hybrid.Torch,) if has_ranks else (hybrid.Torch, hybrid.Threads):
            monkeypatch.setattr(side, "losses", lambda _: self.expected)
        monkeypatch.setattr(hybrid.Torch, "parameter_bytes", torch_bytes)
        if not has_ranks:
            monkeypatch.setattr(hybrid.Threads, "__init__", lambda side, plan, size: setattr(side, "plan", plan))
            monkeypatch.setattr(hybrid.Threads, "parameter_bytes", lambda side: rank_bytes(side.plan))
        monkeypatch.setattr(hybrid, "GlooProcesses", nullcontext)
        monkeypatch.setattr(
            hybrid, "paired", lambda *sides, **_: seconds[: len(sides)] if seconds else pytest.fail("timed")
        )

    def run(self) -> list[Row]:
        return hybrid.run({"tiny": TINY}, 3, 1)


def rank_bytes(plan: Plan) -> list[int]:
    """Of the parameters on each of our ranks, by hand."""
    width, tp = TINY.width, plan.tp
    block = (12 * width**2 + 7 * width) // tp + 6 * width  # cut weights and biases; norms and biases that are not
    embedding, head = 256 * width // tp + TINY.sequence * width, 256 * width // tp + 2 * width
    if plan.pp == 1:
        return [4 * (embedding + NUM_LAYERS * block + head)] * NUM_RANKS
    first, last = 4 * (embedding + 2 * block), 4 * (2 * block + head)
    return [first, last] * 2 if tp == 1 else [first, first, last, last]


def torch_bytes(side: hybrid.Torch) -> list[int]:
    """What torch's ranks are to have."""
    return [whole // (2 if side.peer.startswith("FSDP2") else 1) for whole in rank_bytes(side.plan)]


@pytest.mark.parametrize("fastest", [0, 1])
def test_ours_is_held_against_the_fastest_of_torchs(monkeypatch: pytest.MonkeyPatch, fastest: int) -> None:
    one, ours = [4.0, 4.0, 5.0], [1.0, 2.0, 3.0]
    fast, slow = [10.0, 20.0, 90.0], [1.0, 30.0, 40.0]  # the median counts: neither the mean nor the best
    peers = [fast, slow] if fastest == 0 else [slow, fast]
    rows = Known(monkeypatch, [one, ours, *peers, slow, slow], has_ranks=False).run()
    assert len(rows) == 2 * len(CASES)
    for (name, case), beside_torch, beside_one in zip(CASES.items(), rows[::2], rows[1::2], strict=True):
        assert (beside_torch.case, beside_torch.peer) == (f"{name} tiny", "torch")
        assert beside_torch.ratio == pytest.approx(0.1)
        assert beside_torch.extra == {"ours_s": 2.0, "peer_s": 20.0, "peer_plan": case.peers[fastest]}
        assert (beside_one.case, beside_one.peer) == (f"{name} tiny", "one process")
        assert beside_one.ratio == 0.5
        assert beside_one.extra == {"ours_s": 2.0, "peer_s": 4.0}


def test_every_side_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(monkeypatch, [[1.0] * 3] * 6, has_ranks=False)
    losses, parts = list[str](), list[str]()
    monkeypatch.setattr(hybrid, "check", lambda who, *_: losses.append(who))
    monkeypatch.setattr(hybrid, "check_bytes", lambda who, *_: parts.append(who))
    known.run()
    peers = [f"torch ({peer}) {name} tiny" for name, peer in EVERY_PEER]
    assert sorted(losses) == sorted([*NAMES, *peers])
    assert parts == peers


@pytest.mark.parametrize(
    ("wrong", "who"), [(hybrid.Torch, r"torch \(DDP, whole logits\) dp×tp tiny"), (hybrid.Threads, "dp×tp tiny")]
)
def test_nothing_is_timed_that_trains_otherwise(monkeypatch: pytest.MonkeyPatch, wrong: type, who: str) -> None:
    known = Known(monkeypatch)
    losses = [*known.expected[:2], known.expected[2] + 0.01]
    monkeypatch.setattr(wrong, "losses", lambda self: losses)
    with pytest.raises(MplabError, match=f"^{who}: its losses .* are not one process's"):
        known.run()


@pytest.mark.parametrize("wrong", ["DDP, loss_parallel", "FSDP2, whole logits"])
def test_nothing_is_timed_that_is_not_cut_as_ours(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    known = Known(monkeypatch)

    def parameter_bytes(side: hybrid.Torch) -> list[int]:
        right = torch_bytes(side)
        return [*right[:3], 2 * right[3]] if side.peer == wrong else right

    monkeypatch.setattr(hybrid.Torch, "parameter_bytes", parameter_bytes)
    with pytest.raises(MplabError, match=rf"^torch \({wrong}\) dp×tp tiny: its ranks have .* bytes"):
        known.run()


def test_a_gradient_that_is_too_large_shows_in_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(monkeypatch)
    monkeypatch.setattr(hybrid, "LEARNING_RATE", 2 * hybrid.LEARNING_RATE)
    with pytest.raises(MplabError, match=r"^dp×tp tiny: its losses"):
        known.run()


@pytest.mark.parametrize(
    ("name", "of_ranks"),
    [
        ("dp×tp", [[1.0, 2.0], [1.0, 2.0], [3.0, 6.0], [3.0, 6.0]]),
        ("dp×pp", [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 6.0]]),
        ("pp×tp", [[0.0, 0.0], [0.0, 0.0], [2.0, 4.0], [2.0, 4.0]]),
    ],
)
def test_losses_of_replicas_are_those_of_their_last_stages(name: str, of_ranks: list[list[float]]) -> None:
    """Ranks are numbered with the tensor axis innermost, the data axis outermost."""
    plan, peers = CASES[name]

    class Told:
        def call(self, fn: object, peer: str, json: str, size: Size, num_steps: int) -> list[list[float]]:
            assert (fn, peer, size, num_steps) == (torch_hybrid.losses, peers[0], TINY, hybrid.NUM_CHECKED)
            assert Plan.from_json(json) == plan
            return of_ranks

    gloo: Any = Told()
    assert hybrid.Torch(gloo, peers[0], plan, TINY).losses() == [2.0, 4.0]


@pytest.mark.parametrize("name", CASES)
def test_our_ranks_train_by_the_plan_with_plain_sgd(name: str) -> None:
    plan = CASES[name].plan
    threads = hybrid.Threads(plan, TINY)
    assert threads.parameter_bytes() == rank_bytes(plan)
    for engine in threads.engines:
        assert engine.plan == plan
        assert type(engine.optimizer) is torch.optim.SGD
        assert all(group["lr"] == 0.1 and not group["momentum"] for group in engine.optimizer.param_groups)


def test_bytes_by_hand_are_the_models() -> None:
    assert rank_bytes(Plan(dp=4)) == [4 * sum(p.numel() for p in gpt(TINY).parameters())] * 4


@pytest.mark.parametrize(("num_cores", "expected"), [(2, 2), (64, NUM_RANKS)])
def test_one_process_has_a_thread_for_each_core_or_rank(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, expected: int
) -> None:
    monkeypatch.setattr(hybrid, "num_cores", lambda: num_cores)
    known, seen = Known(monkeypatch, has_ranks=False), set[int]()
    step = Serial.step

    def remember(self: Serial, batch: Any) -> float:
        seen.add(torch.get_num_threads())
        return step(self, batch)

    def times(one: Any, *others: Any, **_: int) -> list[list[float]]:
        monkeypatch.setattr(Serial, "step", remember)
        return [[one()], *[[1.0] for _ in others]]

    monkeypatch.setattr(hybrid, "paired", times)
    monkeypatch.setattr(hybrid, "CASES", {"dp×pp": CASES["dp×pp"]})
    known.run()
    assert seen == {expected}


# -- torch's side -----------------------------------------------------------------------------------------------------


def seen_in_a_step(rank: int, peer: str, plan: str, size: list[int]) -> dict[str, Any]:
    """What one of the processes is made of, and what it does in a step after the first, which finds out shapes, too."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    side = torch_hybrid.side(rank, peer, plan, *size)
    if all(parameter.grad is None for parameter in side.parameters):  # no test before this one has trained it
        side.step()
    samples, is_cut, loss = list[int](), list[bool](), torch_hybrid.cross_entropy

    def remember(outputs: Tensor, targets: Tensor) -> Tensor:
        is_cut.append(isinstance(outputs, DTensor))
        return loss(outputs, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_hybrid, "cross_entropy", remember)
        hook = side.model.register_forward_pre_hook(lambda _, inputs: samples.append(len(inputs[0])))
        side.step()
        hook.remove()
    blocks = [module for module in side.model.modules() if isinstance(module, Block)]
    return {
        "is_ddp": isinstance(side.model, nn.parallel.DistributedDataParallel),
        "sharded": [isinstance(module, FSDPModule) for module in (side.model, *blocks)],
        "num_blocks": len(blocks),
        "samples": samples,
        "has_cut_logits": is_cut,
        "optimizer": [type(side.optimizer).__name__, {group["lr"] for group in side.optimizer.param_groups}.pop()],
        "num_threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize(("name", "peer"), EVERY_PEER)
def test_each_peer_is_what_it_is_called(name: str, peer: str, gloo: GlooProcesses) -> None:
    plan = CASES[name].plan
    samples = [TINY.batch_size // plan.dp // plan.num_microbatches] * plan.num_microbatches
    for rank, seen in enumerate(gloo.call(seen_in_a_step, peer, plan.to_json(), TINY)):
        is_last = rank // plan.tp % plan.pp == plan.pp - 1
        assert seen.pop("is_ddp") == peer.startswith("DDP")
        num_blocks = seen.pop("num_blocks")
        assert num_blocks == NUM_LAYERS // plan.pp
        assert seen.pop("sharded") == [peer.startswith("FSDP2")] * (1 + num_blocks)
        assert seen.pop("samples") == samples
        assert seen.pop("has_cut_logits") == [peer.endswith("loss_parallel")] * len(samples) * is_last
        assert seen == {"optimizer": ["SGD", 0.1], "num_threads": 1}


def test_times_of_a_process_begin_after_a_step_and_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    check_stamps(
        torch_hybrid, lambda: torch_hybrid.stamps(0, "DDP", CASES["dp×pp"].plan.to_json(), [*TINY], 2), monkeypatch
    )
