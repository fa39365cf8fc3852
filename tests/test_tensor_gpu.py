"""Tensor parallelism on CUDA streams: ranks of one GPU train as one process on the CPU does.

Skipped where there is no GPU.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from limits import memory_comes_back as memory_comes_back
from torch import Tensor, nn
from torch.nn import functional

from mplab import World
from mplab.datasets import Batch
from mplab.models import GPT, GPTConfig, seed_parameters
from mplab.parallel import Serial, TensorParallel, tensor_parallel, vocab_parallel_cross_entropy
from mplab.world import Rank

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
TOLERANCE = 1e-9  # a GPU adds up in another order
SGD = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
NUM_STEPS = 4
CONFIG = GPTConfig(vocab_size=8, context_length=8, num_layers=2, num_heads=4, width=16)
LARGE = GPTConfig(vocab_size=500, context_length=64, num_layers=2, num_heads=4, width=256)

both_ways = pytest.mark.parametrize("sequence_parallel", [False, True])
overlapping = pytest.mark.parametrize("overlap", [False, True])


def gpt(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    return GPT(config, seed).double()


def batches(config: GPTConfig = CONFIG, num_samples: int = 5) -> list[Batch]:
    generator, shape = torch.Generator().manual_seed(1), (NUM_STEPS, 2, num_samples, config.context_length)
    return [(inputs, targets) for inputs, targets in torch.randint(config.vocab_size, shape, generator=generator)]


def serial(model: nn.Module, data: list[Batch], device: str = "cpu", **options: Any) -> tuple[list[float], nn.Module]:
    """Losses, and a trained copy of the model."""
    trained = copy.deepcopy(model).to(device)
    step = Serial(trained, SGD(trained.parameters()), **options).step
    return [step(batch) for batch in data], trained


def assert_trained(losses: list[float], engine: TensorParallel, want: tuple[list[float], nn.Module]) -> None:
    assert losses == pytest.approx(want[0], abs=TOLERANCE)
    trained = want[1]
    for name, gradient in engine.full_gradients().items():
        assert gradient.is_cuda
        torch.testing.assert_close(gradient.cpu(), trained.get_parameter(name).grad.cpu(), rtol=0, atol=TOLERANCE)
    for name, weight in engine.full_state_dict().items():
        torch.testing.assert_close(weight.cpu(), trained.state_dict()[name].cpu(), rtol=0, atol=TOLERANCE)


@overlapping
@both_ways
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_streams_train_as_one_cpu_does(num_ranks: int, sequence_parallel: bool, overlap: bool) -> None:
    """With the batches and the model on the CPU: the parts that are trained are on the GPU."""
    for options in ({}, {"num_microbatches": 2, "max_norm": 0.5}):
        want = serial(gpt(), batches(), **options)

        def work(rank: Rank, options: dict[str, Any] = options, want: Any = want) -> None:
            start = gpt(seed=rank.index)  # only rank 0's weights count
            engine = TensorParallel(start, rank.comm, None, sequence_parallel, overlap, optimizer=SGD, **options)
            assert all(p.is_cuda for p in engine.model.parameters())
            assert_trained([engine.step(batch) for batch in batches()], engine, want)

        World(num_ranks, DEVICE).run(work)


@both_ways
def test_a_llama_on_streams_trains_as_on_one_cpu(sequence_parallel: bool) -> None:
    """By the plan that it carries; its norms compute in float32."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=8, intermediate_size=32, max_position_embeddings=8, **sizes)
        )
    seed_parameters(model.double())
    of_logits: Any = lambda output, targets: functional.cross_entropy(output.logits.mT, targets)  # noqa: E731
    want, _ = serial(model, batches(), loss_fn=of_logits)

    def work(rank: Rank) -> list[float]:
        engine = TensorParallel(model, rank.comm, None, sequence_parallel, overlap=True, optimizer=SGD)
        return [engine.step(batch) for batch in batches()]

    for losses in World(2, DEVICE).run(work):
        assert losses == pytest.approx(want, abs=1e-5)


@overlapping
@both_ways
def test_larger_activations_that_a_late_stream_still_writes(sequence_parallel: bool, overlap: bool) -> None:
    """Of some megabytes, so that a stream is behind its host when they are handed on; above and below SMALL_BYTES."""
    start = gpt(LARGE)
    for num_samples in (2, 16):
        data = batches(LARGE, num_samples)
        want = serial(start, data, DEVICE)

        def work(rank: Rank, data: list[Batch] = data, want: Any = want) -> None:
            engine = TensorParallel(start, rank.comm, None, sequence_parallel, overlap, optimizer=SGD)
            losses = []
            for batch in data:
                if rank.index % 2:
                    torch.cuda._sleep(2_000_000)  # this stream is late
                losses.append(engine.step(batch))
            assert_trained(losses, engine, want)

        World(4, DEVICE).run(work)


def test_it_goes_on_in_another_run_of_streams() -> None:
    """Its tensors come from streams that are gone."""
    want = serial(gpt(), batches())
    world = World(2, DEVICE)
    engines = world.run(lambda rank: TensorParallel(gpt(), rank.comm, None, True, True, optimizer=SGD))
    losses: list[float] = []

    def go_on(rank: Rank, batch: Batch) -> float:
        engines[rank.index].connect(rank.comm)
        return engines[rank.index].step(batch)

    def check(rank: Rank) -> None:
        engines[rank.index].connect(rank.comm)
        assert_trained(losses, engines[rank.index], want)

    for batch in batches():
        first, second = world.run(go_on, batch)
        assert first == second
        losses.append(first)
    world.run(check)
    engines.clear()


@both_ways
def test_the_host_does_not_wait_for_the_gpu(sequence_parallel: bool) -> None:
    """Forward, loss and backward are under way before the stream has got there."""

    def run(rank: Rank) -> bool:
        model = tensor_parallel(gpt(), rank.comm, None, sequence_parallel, overlap=True)
        inputs, targets = (x.to(rank.device) for x in batches()[0])
        for is_late in (False, True):  # the first time kernels are loaded and memory is reserved
            torch.cuda.current_stream().synchronize()
            rank.comm.barrier()
            if is_late:
                torch.cuda._sleep(2_000_000_000)  # about a second
            vocab_parallel_cross_entropy(model(inputs), targets, rank.comm).backward()
        return torch.cuda.current_stream().query()

    assert World(2, DEVICE).run(run) == [False, False]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_target_that_is_no_class_is_nan(smoothing: float) -> None:
    """On a CPU it is an error; here asking would keep the host waiting."""
    logits = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 7, -100, 3, 4, 5])

    def run(rank: Rank, targets: Tensor) -> tuple[float, Tensor]:
        mine = logits.tensor_split(2, -1)[rank.index].to(rank.device).requires_grad_()
        options = {"label_smoothing": smoothing}
        loss = vocab_parallel_cross_entropy(mine, targets.to(rank.device), rank.comm, **options)
        loss.backward()
        assert mine.grad is not None
        return loss.item(), mine.grad.cpu()

    whole = logits.clone().requires_grad_()
    want = functional.cross_entropy(whole, targets, label_smoothing=smoothing)
    want.backward()
    losses, gradients = zip(*World(2, DEVICE).run(run, targets), strict=True)
    assert losses[0] == losses[1] == pytest.approx(want.item(), abs=TOLERANCE)
    torch.testing.assert_close(torch.cat(gradients, -1), whole.grad, rtol=0, atol=TOLERANCE)
    for wrong in (8, -1, 1 << 40):
        losses, _ = zip(*World(2, DEVICE).run(run, targets.index_fill(0, torch.tensor(3), wrong)), strict=True)
        assert all(loss != loss for loss in losses)


def test_a_trainer_returns_the_nan_of_a_wrong_target_on_every_rank() -> None:
    inputs, targets = batches()[0]
    wrong = targets.clone()
    wrong[0, 0] = 8

    def run(rank: Rank) -> float:
        return TensorParallel(gpt(), rank.comm, optimizer=SGD).step((inputs, wrong))

    losses = World(2, DEVICE).run(run)
    assert all(loss != loss for loss in losses)


def test_dropout_on_streams_drops_the_same_on_every_rank() -> None:
    """Each draws from a generator of its own, on its device."""
    with torch.random.fork_rng(devices=[]):
        start = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5))

    def run(rank: Rank) -> list[Tensor]:
        model = tensor_parallel(start, rank.comm, {"1": "column", "2": "row"})
        return [model(torch.ones(2, 3, 8, device=rank.device)).cpu() for _ in range(3)]

    first, second = World(2, DEVICE).run(run)
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
        assert 0 < (mine == 0).sum() < mine.numel()
    assert not torch.equal(first[0] == 0, first[1] == 0)
