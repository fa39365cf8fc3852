"""The pipeline on CUDA streams: four ranks of one GPU train as one process on the CPU does.

Skipped where there is no GPU.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from limits import memory_comes_back as memory_comes_back
from pipelines import (
    ALL_ORDERS,
    OPTIMIZERS,
    Trained,
    assert_gradients,
    assert_losses,
    batches,
    chain,
    serial_chain,
    stages_a_rank,
    train_serially,
)
from torch import Tensor

from mplab import World
from mplab.models import GPT, GPTConfig
from mplab.parallel import PipelineParallel
from mplab.plan.partition import by_depth
from mplab.plan.schedule import build
from mplab.world import Rank

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-9  # a GPU adds up in another order
NUM_STEPS = 4
DATA = batches(num_batches=NUM_STEPS)


def assert_weights(weights: dict[str, Tensor], trained: Trained) -> None:
    assert all(weight.is_cuda for weight in weights.values())
    on_host = {name: weight.cpu() for name, weight in weights.items()}
    torch.testing.assert_close(on_host, trained.weights, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("order", ALL_ORDERS)
def test_four_streams_train_as_one_cpu_does(order: str, tied: bool, num_ranks: int) -> None:
    """With the batch and the model on the CPU: the stages are on the GPU."""
    trained = serial_chain("adamw", NUM_STEPS, tied=tied)
    cuts = by_depth(8, num_ranks * stages_a_rank(order)).cuts
    model = chain(tied=tied)

    def work(rank: Rank) -> None:
        options = {"num_microbatches": 5, "optimizer": OPTIMIZERS["adamw"], "recompute": tied}
        pipe = PipelineParallel(model, cuts, rank.comm, ALL_ORDERS[order], **options)
        losses = [pipe.step(DATA[0])]
        assert all(p.is_cuda for stage in pipe.stages.values() for p in stage.parameters())
        on_host = {name: None if g is None else g.cuda() for name, g in trained.gradients.items()}
        assert_gradients(pipe, Trained(trained.start, trained.losses, on_host, trained.weights), TOLERANCE)
        losses += [pipe.step(batch) for batch in DATA[1:]]
        assert_losses(losses, trained, TOLERANCE)
        assert_weights(pipe.state_dict(), trained)

    World(num_ranks, device="cuda:0").run(work)


@pytest.mark.parametrize("order", ["1f1b", "zero_bubble", "interleaved"])
def test_larger_messages_that_a_stream_still_writes(order: str) -> None:
    """Activations of some megabytes, so that a stream is behind its host when they are handed on."""
    config = GPTConfig(vocab_size=50, context_length=64, num_layers=6, num_heads=4, width=128, tied=True)
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(50, (32, 64), generator=generator) for _ in range(6)]
    data = list(zip(draw[::2], draw[1::2], strict=True))
    trained = train_serially(GPT(config).double().cuda(), data, OPTIMIZERS["sgd"])
    cuts = by_depth(8, 4 * stages_a_rank(order)).cuts
    model = GPT(config).double()

    def work(rank: Rank) -> dict[str, Tensor]:
        pipe = PipelineParallel(model, cuts, rank.comm, order, 8, optimizer=OPTIMIZERS["sgd"])
        losses = [pipe.step(batch) for batch in data]
        assert_losses(losses, trained, TOLERANCE)
        return pipe.state_dict()

    for weights in World(4, device="cuda:0").run(work):
        torch.testing.assert_close(weights, trained.weights, rtol=0, atol=TOLERANCE)


def test_layers_move_between_streams() -> None:
    trained = serial_chain("adamw", NUM_STEPS, tied=True)
    draw = random.Random(0)

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(
            chain(tied=True), (2, 4, 6), rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["adamw"]
        )
        losses = []
        for batch, cuts in zip(DATA, moves, strict=True):
            pipe.move(cuts)
            losses.append(pipe.step(batch))
        assert_losses(losses, trained, TOLERANCE)
        assert_weights(pipe.state_dict(), trained)

    moves = [tuple(sorted(draw.sample(range(1, 8), 3))) for _ in DATA]
    World(4, device="cuda:0").run(work)


def test_a_pipeline_goes_on_in_another_run_of_streams() -> None:
    """Its tensors come from streams that are gone."""
    trained = serial_chain("adamw", NUM_STEPS, tied=True)
    options = {"num_microbatches": 3, "optimizer": OPTIMIZERS["adamw"]}
    world = World(4, device="cuda:0")
    pipes = world.run(lambda rank: PipelineParallel(chain(tied=True), (2, 4, 6), rank.comm, **options))

    def go_on(rank: Rank, step: int) -> float:
        pipes[rank.index].connect(rank.comm)
        return pipes[rank.index].step(DATA[step])

    losses = [world.run(go_on, step) for step in range(NUM_STEPS)]
    for rank in range(4):
        assert_losses([of_ranks[rank] for of_ranks in losses], trained, TOLERANCE)


def test_the_timeline_is_the_devices() -> None:
    schedule = build("zero_bubble", 4, 6)
    world = World(4, device="cuda:0")
    world.run(
        lambda rank: PipelineParallel(chain(), (2, 4, 6), rank.comm, schedule, optimizer=OPTIMIZERS["sgd"]).step(
            DATA[0]
        )
    )
    for rank, actions in enumerate(schedule.ranks):
        events = [e for e in world.timeline.events if (e.rank, e.lane) == (rank, "compute")]
        events.sort(key=lambda event: event.start_s)
        want = [(schedule.span_name(action), action.microbatch) for action in actions]
        assert [(event.name, event.microbatch) for event in events] == [*want, ("update", None)]
        assert all(a.start_s <= a.end_s <= b.start_s for a, b in itertools.pairwise(events))


@pytest.mark.parametrize("m", [8, 16])
def test_1f1b_keeps_less_on_the_gpu_than_gpipe(m: int) -> None:
    """The allocator's own count, over all ranks; sums of p - rank micro-batches against m each."""
    config = GPTConfig(vocab_size=50, context_length=64, num_layers=6, num_heads=4, width=64)
    tokens = torch.randint(50, (2 * m, 64), generator=torch.Generator().manual_seed(0))
    model = GPT(config)
    peaks = {}
    for order in ("gpipe", "1f1b"):

        def work(rank: Rank, order: str = order) -> int:
            pipe = PipelineParallel(model, (2, 4, 6), rank.comm, order, m, optimizer=OPTIMIZERS["sgd"])
            pipe.step((tokens, tokens))
            rank.comm.barrier()
            if rank.index == 0:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            rank.comm.barrier()
            before = torch.cuda.memory_allocated()
            pipe.step((tokens, tokens))
            torch.cuda.synchronize()
            rank.comm.barrier()
            return torch.cuda.max_memory_allocated() - before

        peaks[order] = max(World(4, device="cuda:0").run(work))
    assert peaks["1f1b"] < peaks["gpipe"] * (4 / m + 1 / m)
