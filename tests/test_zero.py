"""Memory under ZeRO by formula: by hand, and against what tensors of real runs take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import nn

from mplab import MplabError, World
from mplab.comm import collectives
from mplab.datasets import Batch
from mplab.models import GPT, MLP, GPTConfig, layers, tied_names
from mplab.parallel.data import DataParallel
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.profile import profile_layers
from mplab.parallel.sharded import ShardedDataParallel
from mplab.plan.zero import Memory, peak, zero_memory, zero_moments
from mplab.trace.live import LiveBytes
from mplab.world import Rank

SIZES = (64, 256, 256, 256, 10)
LAYERS = st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5)
STAGES = (0, 1, 2, 3)

# --- by hand ---------------------------------------------------------------------------------------------------------


def test_between_two_steps_by_hand() -> None:
    """10 elements in two layers of 7 and 3, over 2 ranks: chunks of 4 and 3, 2 and 1. AdamW on float32."""
    layers = [[5, 2], [3]]
    assert [zero_memory(layers, stage, 2, 0) for stage in STAGES] == [
        Memory(40, 40, 80),
        Memory(40, 24, 48),
        Memory(40, 24, 48),
        Memory(24, 24, 48),
    ]
    assert zero_memory(layers, 3, 2, 1) == Memory(16, 16, 32)
    assert zero_memory(layers, 3, 2, 1, item_bytes=2, state_bytes=4) == Memory(8, 8, 16)
    assert zero_memory(layers, 3, 2, 1, shared=[3]) == Memory(20, 20, 40)
    assert zero_memory(layers, 1, 1) == zero_memory(layers, 0, 1) == Memory(40, 40, 80)
    assert Memory(1, 2, 3, 4).total_bytes == 10


def gradients_of(
    stage: int, layers: Sequence[Sequence[int]] = ((8, 4), (4,), (12,)), shared: Sequence[int] = ()
) -> list[tuple[str, int, int]]:
    """Name, weights and gradients of every moment, in elements, over 2 ranks."""
    moments = zero_moments(layers, stage, 2, item_bytes=1, state_bytes=0, update_bytes=0, shared=shared)
    return [(name, m.parameters_bytes, m.gradients_bytes) for name, m in moments]


def test_every_moment_of_stage_0_by_hand() -> None:
    assert gradients_of(0) == [
        ("forward 0", 28, 0),
        ("forward 1", 28, 0),
        ("forward 2", 28, 0),
        ("backward 2", 28, 12),
        ("backward 1", 28, 16),
        ("backward 0", 28, 28),
        ("update", 28, 28),
        ("rest", 28, 28),
    ]


def test_every_moment_of_stage_1_by_hand() -> None:
    assert gradients_of(1)[5:] == [
        ("backward 0", 28, 28),
        ("join 0", 28, 28 + 12),  # the others are one tensor already
        ("reduce 2", 28, 28 + 6),
        ("reduce 1", 28, 28 - 6 + 2),
        ("reduce 0", 28, 28 - 6 - 2 + 6),
        ("update", 28, 14),
        ("rest", 28, 14),
    ]


def test_every_moment_of_stage_3_by_hand() -> None:
    assert gradients_of(3) == [
        ("forward 0", 14 + 12 + 4, 0),  # the chunks, this layer, and the next one
        ("forward 1", 14 + 4 + 12, 0),
        ("forward 2", 14 + 12, 0),  # it stays for the backward
        ("backward 2", 14 + 12 + 4, 12),
        ("backward 1", 14 + 4 + 12, 12 + 4),
        ("reduce 2", 14 + 4 + 12, 12 + 4 + 6),
        ("backward 0", 14 + 12, 6 + 4 + 12),
        ("reduce 1", 14 + 12, 6 + 4 + 12 + 2),
        ("join 0", 14, 6 + 2 + 12 + 12),
        ("reduce 0", 14, 6 + 2 + 12 + 6),
        ("update", 14, 14),
        ("rest", 14, 14),
    ]


def test_stage_2_has_stage_3s_gradients_and_all_weights() -> None:
    assert gradients_of(2) == [(name, 28, gradients) for name, _, gradients in gradients_of(3)]


def test_what_several_layers_share_is_there_all_the_time_and_reduced_last() -> None:
    """8 elements, beside layers of 4 and 12: gathered before the first forward, their gradients there from the first
    backward on, and both until the last reduction is over.
    """
    assert gradients_of(3, [[4], [12]], [8]) == [
        ("forward 0", 12 + 8 + 4 + 12, 0),
        ("forward 1", 12 + 8 + 12, 0),
        ("backward 1", 12 + 8 + 12 + 4, 8 + 12),
        ("backward 0", 12 + 8 + 4, 8 + 12 + 4),
        ("reduce 1", 12 + 8 + 4, 8 + 12 + 4 + 6),
        ("reduce 0", 12 + 8, 8 + 6 + 4 + 2),
        ("reduce shared", 12 + 8, 8 + 6 + 2 + 4),
        ("update", 12, 12),
        ("rest", 12, 12),
    ]
    assert gradients_of(1, [[4], [12]], [8])[2:] == [
        ("backward 1", 24, 8 + 12),
        ("backward 0", 24, 8 + 12 + 4),
        ("reduce 1", 24, 8 + 12 + 4 + 6),
        ("reduce 0", 24, 8 + 6 + 4 + 2),
        ("reduce shared", 24, 8 + 6 + 2 + 4),
        ("update", 24, 12),
        ("rest", 24, 12),
    ]


def test_the_peak_is_the_first_moment_at_which_the_most_is_held() -> None:
    moments = zero_moments([[8]], 0, 1, update_bytes=0)
    assert [m.total_bytes for _, m in moments] == [96, 128, 128, 128]
    assert peak(moments).name == "backward 0"


def test_activations_pile_up_and_go() -> None:
    """The one of a layer without parameters counts with the layer before it, or with the first that has some."""
    for stage in STAGES:
        moments = zero_moments([[], [8], [], [4], [2]], stage, 2, activation_bytes=[1, 10, 100, 1000, 10000])
        held = {name: memory.activations_bytes for name, memory in moments}
        assert [held[f"forward {i}"] for i in (1, 3, 4)] == [111, 1111, 11111]
        assert [held[f"backward {i}"] for i in (4, 3, 1)] == [11111, 1111, 111]
        assert held["update"] == held["rest"] == 0


def test_the_optimizer_takes_more_while_it_updates() -> None:
    """8 bytes an element of a tensor, and 4 of the one before. Stage 1 on rank 1 has half of each layer, backwards."""
    assert update_bytes_of([[4, 6]], 0) == 8 * 6 + 4 * 4
    assert update_bytes_of([[6, 4]], 0) == 8 * 4 + 4 * 6
    assert update_bytes_of([[9, 4]], 0) == 8 * 9
    assert update_bytes_of([[4, 6], [3]], 0) == 8 * 6 + 4 * 4
    assert update_bytes_of([[2]], 0, shared=[10]) == 8 * 10  # it comes first, where the model has it
    assert update_bytes_of([[4, 6]], 1) == 8 * 5
    assert update_bytes_of([[6, 4], [10]], 1) == 8 * 5  # 5, 1, 4
    assert update_bytes_of([[10], [6, 4]], 1) == 8 * 5 + 4 * 4  # 1, 4, 5
    assert update_bytes_of([[10]], 1, shared=[10]) == 8 * 5 + 4 * 5


def update_bytes_of(layers: list[list[int]], stage: int, shared: list[int] | None = None) -> int:
    *_, update, rest = zero_moments(layers, stage, 2, rank=1, shared=shared or [])
    assert (update.name, rest.name) == ("update", "rest")
    return update.memory.total_bytes - rest.memory.total_bytes


@given(
    layers=LAYERS, shared=st.lists(st.integers(0, 40), max_size=2), n=st.integers(1, 5), stage=st.sampled_from(STAGES)
)
def test_what_a_step_takes_it_gives_back(layers: list[list[int]], shared: list[int], n: int, stage: int) -> None:
    sums = [0, 0, 0]
    whole = zero_memory(layers, 0, 1, shared=shared)
    for rank in range(n):
        rest = zero_memory(layers, stage, n, rank, shared=shared)
        *moments, last = zero_moments(layers, stage, n, rank, [4] * len(layers), shared=shared)
        assert last.memory == rest
        assert all(min(m.parameters_bytes, m.gradients_bytes, m.activations_bytes) >= 0 for _, m in moments)
        assert peak(moments).memory.total_bytes == max(m.total_bytes for _, m in moments)
        assert [m for _, m in moments][-1].gradients_bytes == rest.gradients_bytes
        *before, _ = moments
        if before and layers != [[]]:
            held = before[-1].memory
            assert held.optimizer_bytes == rest.optimizer_bytes
        parts = (rest.parameters_bytes, rest.gradients_bytes, rest.optimizer_bytes)
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    copies = [1 if stage >= first else n for first in (3, 1, 1)]
    assert sums == [
        copies[0] * whole.parameters_bytes,
        copies[1] * whole.gradients_bytes,
        copies[2] * whole.optimizer_bytes,
    ]


def test_published_ratios() -> None:
    """Of many layers on n ranks: 16 bytes a parameter become 8 + 8/n, 4 + 12/n and 16/n."""
    layers, n = [[10**6]] * 200, 64
    at_peak = [peak(zero_moments(layers, stage, n, update_bytes=0)).memory.total_bytes / 2e8 for stage in STAGES]
    assert at_peak == pytest.approx([16, 8 + 8 / n, 4 + 12 / n, 16 / n], abs=0.1)
    assert all(less < more for more, less in pairwise(at_peak))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zero_memory([[1]], 4, 2), "stage 4: must be 0"),
        (lambda: zero_memory([[1]], 1, 2, 2), "rank 2 of 2: ranks are numbered from 0 to 1"),
        (lambda: zero_memory([[1]], 1, 0), "rank 0 of 0"),
        (lambda: zero_memory([[1], [-3]], 1, 2), "-3 elements"),
        (lambda: zero_memory([[1]], 1, 2, shared=[-2]), "-2 elements"),
        (lambda: zero_memory([[1]], 1, 2, item_bytes=-4), "-4 elements or bytes"),
        (lambda: zero_memory([[1]], 1, 2, state_bytes=-8), "-8 elements or bytes"),
        (lambda: zero_moments([[1]], 1, 2, activation_bytes=[-5]), "-5 elements or bytes"),
        (lambda: zero_moments([[1]], 1, 2, update_bytes=-1), "-1 elements or bytes"),
        (lambda: zero_moments([[1], [2]], 1, 2, activation_bytes=[5]), "1 activation_bytes for 2 layers"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(MplabError, match=message):
        call()


# --- against live tensors --------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[OptimizerFactory, int, int]] = {
    "adamw": (torch.optim.AdamW, 8, 8),
    "momentum": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 4, 0),
    "sgd": (partial(torch.optim.SGD, lr=0.1), 0, 0),
}


@pytest.fixture(autouse=True)
def _each_rank_computes_its_own_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with larger models; else one rank makes all results of a small collective."""
    monkeypatch.setattr(collectives, "SMALL_BYTES", 0)


def measure(rank: Rank, model: nn.Module, batch: Batch, stage: int, optimizer: OptimizerFactory) -> tuple[int, int]:
    """Bytes between two steps, and at the peak of one."""
    with LiveBytes() as live:
        strategy: DataParallel | ShardedDataParallel
        if stage:
            strategy = ShardedDataParallel(model, rank.comm, stage, optimizer=optimizer)
        else:
            strategy = DataParallel(model, rank.comm, bucket_bytes=100_000, optimizer=optimizer)
        strategy.step(batch)  # the optimizer makes its state
        rank.comm.barrier()
        live.restart()
        strategy.step(batch)
        rank.comm.barrier()  # until then another rank's thread may still hold something of this one's
        return live.now_bytes, live.peak_bytes


def random_batch(num_features: int, num_samples: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_samples, num_features, generator=generator), torch.arange(num_samples)


@pytest.mark.parametrize(
    ("n", "stage", "optimizer"),
    [
        *product([4], STAGES, OPTIMIZERS),
        *((n, stage, [*OPTIMIZERS][(n + stage) % 3]) for n in (1, 2) for stage in STAGES),
    ],
)
def test_measured_memory_is_the_predicted(n: int, stage: int, optimizer: str) -> None:
    """Between steps but for a counter and a sum, 4 bytes each, a tensor; at the peak within 5 %."""
    make, state_bytes, update_bytes = OPTIMIZERS[optimizer]
    model = MLP(SIZES)
    lengths = [[p.numel() for p in layer.parameters()] for layer in model]
    measured = World(n, device="cpu").run(measure, model, random_batch(SIZES[0]), stage, make)
    for rank, (rest_bytes, peak_bytes) in enumerate(measured):
        not_predicted = rest_bytes - zero_memory(lengths, stage, n, rank, 4, state_bytes).total_bytes
        assert 0 <= not_predicted <= 8 * sum(map(len, lengths))
        moments = zero_moments(lengths, stage, n, rank, None, 4, state_bytes, update_bytes)
        assert peak_bytes == pytest.approx(peak(moments).memory.total_bytes, rel=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_measured_memory_of_a_gpt_with_tied_embeddings(stage: int) -> None:
    n, model = 2, GPT(GPTConfig(context_length=4, num_layers=3, num_heads=2, width=64))
    chain = layers(model)
    tied = {model.get_parameter(names[0]) for names in tied_names(chain)}
    assert len(tied) == 1
    lengths = [[p.numel() for _, p in layer.named_parameters() if p not in tied] for layer in chain]
    shared = [p.numel() for p in tied]
    tokens = torch.arange(4).repeat(2, 1)
    measured = World(n, device="cpu").run(measure, model, (tokens, tokens), stage, torch.optim.AdamW)
    for rank, (rest_bytes, peak_bytes) in enumerate(measured):
        not_predicted = rest_bytes - zero_memory(lengths, stage, n, rank, shared=shared).total_bytes
        assert 0 <= not_predicted <= 8 * (sum(map(len, lengths)) + 1)
        predicted = peak(zero_moments(lengths, stage, n, rank, shared=shared)).memory.total_bytes
        assert peak_bytes == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_measured_memory_with_activations(stage: int) -> None:
    """They take a third of the peak; `profile_layers` says how much each layer keeps."""
    n, model = 2, MLP((128,) * 6)
    inputs, targets = random_batch(128, 128)
    lengths = [[p.numel() for p in layer.parameters()] for layer in model]
    own = (inputs[: 128 // n], targets[: 128 // n])
    kept = [int(cost.activation_bytes) for cost in profile_layers(model, own, 1, num_repeats=1)]
    measured = World(n, device="cpu").run(measure, model, (inputs, targets), stage, torch.optim.AdamW)
    for rank, (_, peak_bytes) in enumerate(measured):
        predicted = peak(zero_moments(lengths, stage, n, rank, kept)).memory
        assert peak_bytes == pytest.approx(predicted.total_bytes, rel=0.05)
    without = peak(zero_moments(lengths, stage, n)).memory.total_bytes
    assert stage < 2 or predicted.total_bytes > 1.1 * without
