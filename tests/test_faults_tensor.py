"""What a world tells of tensor parallelism: faults of ranks that share layers, what is sent when, a profile.

Bounds on time are far above what is needed: they tell "at once" from "at the time-out" (30 s), and nothing else.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from test_faults import AT_ONCE_S, OwnError, works
from torch import Tensor, nn

from mplab import CollectiveMismatch, CommTimeout, Deadlock, Link, MplabError, PeerFailure, World
from mplab.errors import NonFiniteGradient
from mplab.models import GPT, GPTConfig
from mplab.parallel import TensorParallel, tensor_parallel, vocab_parallel_cross_entropy
from mplab.trace.event import Event
from mplab.world import Rank

CONFIG = GPTConfig(vocab_size=8, context_length=8, num_layers=2, num_heads=4, width=8)
SGD = partial(torch.optim.SGD, lr=0.1)

ways = pytest.mark.parametrize(
    "options",
    [{}, {"overlap": True}, {"sequence_parallel": True}, {"sequence_parallel": True, "overlap": True}],
    ids=["plain", "overlap", "sequence", "sequence-overlap"],
)


def tokens(length: int = 8) -> tuple[Tensor, Tensor]:
    inputs, targets = torch.randint(8, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    return inputs[:, :length], targets[:, :length]


def trainer(rank: Rank, **options: Any) -> TensorParallel:
    return TensorParallel(GPT(CONFIG), rank.comm, optimizer=SGD, **options)


@pytest.fixture(scope="module", autouse=True)
def one_step_before() -> None:
    """The first one has torch import much of itself."""
    World(1, "cpu").run(lambda rank: trainer(rank).step(tokens()))


def fails(world: World, kind: type[BaseException], fn: Callable[[Rank], object], match: str | None = None) -> Any:
    """The error that a run ends with, at once; the next run works."""
    start = time.monotonic()
    with pytest.raises(kind, match=match) as caught:
        world.run(fn)
    assert time.monotonic() - start < AT_ONCE_S
    works(world)
    return caught.value


# --- a rank raises ---------------------------------------------------------------------------------------------------


def raising(*_: object) -> None:
    raise OwnError("no such layer")


@ways
@pytest.mark.parametrize(
    ("where", "num_ranks"), [("forward of micro-batch 1", 2), ("backward of micro-batch 0", 4), ("update", 2)]
)
def test_a_rank_that_raises_in_a_block_is_named_with_its_action(
    where: str, num_ranks: int, options: dict[str, Any]
) -> None:
    seen: list[BaseException] = []

    def run(rank: Rank) -> None:
        engine = trainer(rank, num_microbatches=2, **options)
        up = engine.model.get_submodule("blocks.1.mlp.up")
        if rank.index == 1 and where.startswith("forward"):
            calls = iter((None, OwnError("no such layer")))
            up.register_forward_pre_hook(lambda *_: raising() if next(calls) else None)
        elif rank.index == 1 and where.startswith("backward"):
            up.weight.register_hook(raising)
        elif rank.index == 1:
            engine.optimizer.register_step_pre_hook(raising)
        try:
            engine.step(tokens())
            rank.comm.barrier()
        except BaseException as error:
            seen.append(error)
            raise

    error = fails(World(num_ranks, "cpu"), OwnError, run, "no such layer")
    assert error.__notes__ == [f"(rank 1 of {num_ranks} in {where}; all other ranks were stopped)"]
    assert [type(e) for e in seen if not isinstance(e, PeerFailure)] == [OwnError]
    assert len(seen) == num_ranks


def test_a_rank_out_of_memory_is_named_and_says_how_much_it_asked_for() -> None:
    def run(rank: Rank) -> None:
        engine = trainer(rank)
        if rank.index == 1:
            large = partial(torch.empty, 1 << 50, dtype=torch.uint8)
            engine.model.get_submodule("blocks.0.mlp").register_forward_hook(lambda *_: large())
        engine.step(tokens())

    error = fails(World(2, "cpu"), RuntimeError, run, "can't allocate memory")
    where, lower = error.__notes__
    assert where == "(rank 1 of 2 in forward; all other ranks were stopped)"
    assert "when it asked for 1,125,899,906,842,624 bytes" in lower


@ways
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_on_one_rank(options: dict[str, Any], bad: float) -> None:
    """The part of one rank: it changes nothing, and what the others have stays finite."""
    name = "blocks.1.mlp.up.weight"
    engines: dict[int, TensorParallel] = {}

    def run(rank: Rank) -> None:
        engine = engines[rank.index] = trainer(rank, **options)
        engine.before = [p.detach().clone() for p in engine.model.parameters()]  # type: ignore[attr-defined]
        if rank.index == 1:
            engine.model.get_parameter(name).register_hook(lambda gradient: gradient * bad)
        engine.step(tokens())
        rank.comm.barrier()

    fails(World(2, "cpu"), NonFiniteGradient, run, rf"^rank 1, step 0: the gradient of {name} has a NaN or an Inf")
    for p, before in zip(engines[1].model.parameters(), engines[1].before, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(p, before)
    assert all(bool(p.isfinite().all()) for p in engines[0].model.parameters())


@pytest.mark.parametrize("what", ["tokens", "targets"])
def test_what_is_not_in_the_vocabulary_is_refused_by_every_rank(what: str) -> None:
    seen: list[int] = []

    def run(rank: Rank) -> None:
        inputs, targets = tokens()
        engine = trainer(rank)
        try:
            engine.step((inputs + 1, targets) if what == "tokens" else (inputs, targets + 1))
        except MplabError:
            seen.append(rank.index)
            rank.comm.barrier()  # nobody waits in a collective of the step
            raise

    fails(World(2, "cpu"), MplabError, run, rf"^{what} from \d to 8, but .*0 to 7: build the model with the vocab_size")
    assert sorted(seen) == [0, 1]


# --- ranks disagree --------------------------------------------------------------------------------------------------


@ways
def test_first_batches_of_different_lengths_are_refused_by_every_rank(options: dict[str, Any]) -> None:
    seen: list[str] = []

    def run(rank: Rank) -> None:
        engine = trainer(rank, **options)
        try:
            engine.step(tokens(8 if rank.index == 0 else 4))
        except MplabError as error:
            seen.append(str(error))
            rank.comm.barrier()  # nobody waits in a collective of the step
            raise

    fails(World(2, "cpu"), MplabError, run, "^the ranks were given different settings")
    assert len(seen) == 2
    for said in seen:
        assert "the first batch" in said
        assert all(f"on rank {rank}: " in said for rank in range(2))


@ways
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_later_batches_of_different_lengths_show_both_calls(num_ranks: int, options: dict[str, Any]) -> None:
    def run(rank: Rank) -> None:
        engine = trainer(rank, **options)
        engine.step(tokens())
        engine.step(tokens(8 if rank.index == 0 else 4))

    error = fails(World(num_ranks, "cpu"), CollectiveMismatch, run)
    calls = [line for line in str(error).splitlines() if " called " in line]
    assert len({line.split()[1] for line in calls}) == len(calls) >= 2
    assert {"shape=(3, 8, 8)" in line for line in calls} == {True, False}
    assert all(("shape=(3, 8, 8)" in line) == (line.split()[1] == "0") for line in calls)
    assert error.__notes__[0].endswith(" in forward; all other ranks were stopped)")


def test_a_mismatch_and_a_deadlock_name_the_users_lines() -> None:
    """Not those of torch that lie between the user's call and the collective."""

    def forward(rank: Rank) -> None:
        model = tensor_parallel(GPT(CONFIG), rank.comm)
        x, _ = tokens(8 if rank.index == 0 else 4)
        model(x)

    error = fails(World(2, "cpu"), CollectiveMismatch, forward)
    lines = [line for line in str(error).splitlines() if " called " in line]
    at = f"at {Path(__file__).name}, line {forward.__code__.co_firstlineno + 3}, in forward"
    assert [line.endswith(at) for line in lines] == [True, True], lines

    def backward(rank: Rank) -> None:
        x, y = tokens()
        loss = vocab_parallel_cross_entropy(tensor_parallel(GPT(CONFIG), rank.comm)(x), y, rank.comm)
        if rank.index == 0:
            loss.backward()

    error = fails(World(2, "cpu"), Deadlock, backward)
    (line,) = [line for line in str(error).splitlines() if line.startswith("  rank 0 waits for rank 1 in all_reduce(")]
    assert line.endswith(f"at {Path(__file__).name}, line {backward.__code__.co_firstlineno + 4}, in backward"), line


# --- a rank leaves something out -------------------------------------------------------------------------------------


class LeftOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@ways
@pytest.mark.parametrize("path", ["blocks.0", "blocks.1"])
def test_a_layer_that_one_rank_leaves_out_does_not_hang(path: str, options: dict[str, Any]) -> None:
    """Sooner or later its messages are not what the others send, or it sends none and they wait for it."""

    def run(rank: Rank) -> None:
        engine = trainer(rank, **options)
        if rank.index == 1:
            engine.model.get_submodule(path).forward = LeftOut().forward  # type: ignore[method-assign]
        engine.step(tokens())

    error = fails(World(2, "cpu"), MplabError, run)
    assert isinstance(error, CollectiveMismatch | Deadlock)
    for rank in range(2):
        assert f"\n  rank {rank} " in str(error)


def one_pass(rank: Rank, calls: bool, goes_back: bool, **options: Any) -> None:
    """One's own loop, in which a rank may leave out its forward, or its backward."""
    model = tensor_parallel(GPT(CONFIG), rank.comm, **options)
    inputs, targets = tokens()
    if not calls:
        return
    loss = vocab_parallel_cross_entropy(model(inputs), targets, rank.comm)
    if goes_back:
        loss.backward()


@ways
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_a_pass_that_one_rank_leaves_out_is_a_deadlock_that_says_who_waits(what: str, options: dict[str, Any]) -> None:
    def run(rank: Rank) -> None:
        is_whole = rank.index != 1
        one_pass(rank, is_whole or what == "backward", is_whole or what == "forward", **options)

    error = fails(World(2, "cpu"), Deadlock, run, "^rank 0 waits for rank 1, which has finished\n")
    first, second = str(error).splitlines()[1:]
    sums = "reduce_scatter" if options.get("sequence_parallel") and what == "backward" else "all_reduce"
    assert first.startswith(f"  rank 0 waits for rank 1 in {sums}")
    assert "of group [0, 1]" in first
    assert second == "  rank 1 has finished"


@ways
def test_a_rank_that_is_late_in_a_block_is_named_with_its_line(options: dict[str, Any]) -> None:
    def run(rank: Rank) -> None:
        engine = trainer(rank, **options)
        if rank.index == 1:
            engine.model.get_submodule("blocks.1.mlp.up").register_forward_pre_hook(lambda *_: dawdle())
        engine.step(tokens())

    def dawdle() -> None:
        while True:
            time.sleep(0.01)

    error = fails(World(2, "cpu", timeout_s=0.2), CommTimeout, run, r"^rank 0 waited 0.2 s in .*; late: rank 1\n")
    assert f"rank 1 runs at {Path(__file__).name}, line " in str(error)
    assert "in dawdle" in str(error)


# --- what is sent when -----------------------------------------------------------------------------------------------


class Three(nn.Module):
    """Layers that read one tensor, as query, key and value do."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x) + self.three(x)


def backward_of_columns(overlap: bool, sequence_parallel: bool) -> list[Event]:
    """Rank 0's events in backward. With overlap, rank 1 does not send before rank 0 computes gradients of weights, and
    rank 0 does not end with that before rank 1 has sent.
    """
    computing, sent = threading.Event(), threading.Event()

    def run(rank: Rank) -> None:
        plan = {"0.*": "column", **({"": "scatter"} if sequence_parallel else {})}
        model = tensor_parallel(whole, rank.comm, plan, sequence_parallel, overlap)
        x = torch.ones(2, 4, 4, requires_grad=True)
        rank.comm.iall_reduce = partial(late, rank, rank.comm.iall_reduce)  # type: ignore[method-assign]
        rank.comm.ireduce_scatter = partial(late, rank, rank.comm.ireduce_scatter)  # type: ignore[method-assign]
        for name, p in model.named_parameters():
            if name.endswith("weight"):
                p.register_hook(partial(compute, rank))
        loss = model(x).sum()
        rank.comm.barrier()
        loss.backward()

    def late(rank: Rank, start: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if rank.index == 1:
            assert computing.wait(AT_ONCE_S)
        handle = start(*args, **options)
        if rank.index == 1:
            sent.set()
        return handle

    def compute(rank: Rank, gradient: Tensor) -> None:
        with rank.span("gradient of weights"):
            if rank.index == 0 and overlap:
                computing.set()
                assert sent.wait(AT_ONCE_S)

    whole = nn.Sequential(Three())
    world = World(2, "cpu", link=Link(latency_s=1e-3, bandwidth_bytes_s=1e9))
    world.run(run)
    events = sorted(world.timeline.rank(0), key=lambda e: e.end_s)
    begin = max(e.end_s for e in events if e.name == "barrier")
    return [e for e in events if e.start_s >= begin]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_with_overlap_the_gradient_of_the_input_is_sent_while_those_of_weights_are_computed(
    sequence_parallel: bool,
) -> None:
    events = backward_of_columns(True, sequence_parallel)
    computed = [e for e in events if e.name == "gradient of weights"]
    (message,) = [e for e in events if e.lane == "message" and e.size_bytes]
    (wait,) = [e for e in events if e.lane == "wait"]
    assert len(computed) == 3
    assert message.name == wait.name == ("reduce_scatter" if sequence_parallel else "all_reduce")
    assert computed[0].start_s < message.start_s < computed[0].end_s
    assert computed[-1].end_s <= wait.start_s <= wait.end_s


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_without_overlap_it_is_sent_when_those_of_weights_are_there(sequence_parallel: bool) -> None:
    events = backward_of_columns(False, sequence_parallel)
    computed = [e for e in events if e.name == "gradient of weights"]
    (message,) = [e for e in events if e.lane == "message" and e.size_bytes]
    assert len(computed) == 3
    assert computed[-1].end_s <= message.start_s


# --- a profile -------------------------------------------------------------------------------------------------------


def test_a_step_under_torchs_profiler(tmp_path: Path) -> None:
    """Every rank's spans, messages and products, of its own part of each layer."""
    world = World(2, "cpu")

    def run(rank: Rank) -> None:
        engine = trainer(rank, sequence_parallel=True, overlap=True)
        engine.step(tokens())

    with world.profile(tmp_path) as profiler:
        world.run(run)
    assert len(profiler.files) == 2
    for rank, path in enumerate(profiler.files):
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
        spans = [e["name"] for e in events if e["cat"] == "user_annotation"]
        assert [name for name in spans if name in ("forward", "backward", "update")] == [
            "forward",
            "backward",
            "update",
        ]
        sent = [e["args"]["sent bytes"] for e in events if e.get("args", {}).get("by") == "mplab"]
        assert sum(sent) == world.ledgers[rank].sent_bytes > 0
        names = {e["name"] for e in events}
        assert {"gloo:reduce_scatter", "gloo:all_gather", "gloo:all_reduce", "aten::mm"} <= names
