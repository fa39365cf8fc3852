"""The loss of logits that are cut over the vocabulary, held to torch's of the joined ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor
from torch.nn import functional

from mplab import MplabError, World
from mplab.parallel import vocab_parallel_cross_entropy
from mplab.world import Rank

NUM_CLASSES = 12  # 1, 2, 3 and 4 ranks divide it
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, num_classes: int = NUM_CLASSES) -> Tensor:
    """Each class in turn, so that every rank has some."""
    return (torch.arange(math.prod(shape)) * 5 % num_classes).view(shape)


def by_torch(logits: Tensor, targets: Tensor, scale: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of `scale` times it; in float32 at least, as the lab computes it."""
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    leaf = wide.detach().clone().requires_grad_()
    rows = (leaf.flatten(0, -2), targets.flatten()) if leaf.ndim > 1 else (leaf, targets)
    loss = functional.cross_entropy(*rows, **options)
    (loss * scale).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def over_ranks(
    n: int, logits: Tensor, targets: Tensor, scale: float = 1.0, **options: Any
) -> tuple[list[Tensor], Tensor]:
    """Every rank's loss, and their gradients joined."""

    def work(rank: Rank) -> tuple[Tensor, Tensor]:
        mine = logits.chunk(n, -1)[rank.index].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(mine, targets, rank.comm, **options)
        (loss * scale).backward()
        assert mine.grad is not None
        return loss.detach(), mine.grad

    losses, gradients = zip(*World(n, "cpu").run(work), strict=True)
    return list(losses), torch.cat(gradients, -1)


def assert_alike(n: int, logits: Tensor, targets: Tensor, tolerance: float | None = None, **options: Any) -> Tensor:
    """The loss on every rank, to the bit the same, and the gradient; returns the loss."""
    tolerance = tolerance or TOLERANCES[logits.dtype]
    want, gradient = by_torch(logits, targets, **options)
    losses, gradients = over_ranks(n, logits, targets, **options)
    for loss in losses:
        assert loss.shape == ()
        assert loss.dtype == want.dtype
        assert torch.equal(loss, losses[0]) or bool(want.isnan())
        torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert gradients.dtype == logits.dtype
    torch.testing.assert_close(gradients.to(gradient.dtype), gradient, rtol=tolerance, atol=tolerance, equal_nan=True)
    return want


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_is_torchs_loss_of_the_joined_logits(n: int, label_smoothing: float, dtype: torch.dtype) -> None:
    """Targets in every rank's part; the scale of a gradient that comes from later."""
    logits, targets = (3 * drawn(NUM_CLASSES, NUM_CLASSES)).to(dtype), classes(NUM_CLASSES)
    assert len(set(targets.tolist())) == NUM_CLASSES
    assert_alike(n, logits, targets, label_smoothing=label_smoothing)
    assert_alike(n, logits, targets, label_smoothing=label_smoothing, scale=-2.5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_positions_that_are_ignored(label_smoothing: float) -> None:
    logits, targets = drawn(2, 5, NUM_CLASSES), classes(2, 5)
    targets[0, 1] = targets[1, :3] = -100
    for n in (1, 2, 4):
        assert_alike(n, logits, targets, label_smoothing=label_smoothing)
    for ignore_index in (3, -1, 99):  # a class, and none: as labels of padding are
        other = targets.masked_fill(targets == -100, ignore_index)
        for n in (1, 3):
            options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
            got = over_ranks(n, logits, other, **options)[1]
            assert bool((got[other == ignore_index] == 0).all())
            assert_alike(n, logits, other, **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_where_all_are_ignored_the_loss_is_nan_and_the_gradient_is_zero_as_torchs_are(label_smoothing: float) -> None:
    logits, targets = drawn(3, NUM_CLASSES), torch.full((3,), -100)
    for n in (1, 2):
        assert assert_alike(n, logits, targets, label_smoothing=label_smoothing).isnan()


def test_without_positions_it_is_nan() -> None:
    for n in (1, 2):
        assert assert_alike(n, drawn(0, NUM_CLASSES), torch.zeros(0, dtype=torch.long)).isnan()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
def test_logits_of_any_number_of_dims(shape: tuple[int, ...]) -> None:
    for n in (1, 3):
        assert_alike(n, drawn(*shape, NUM_CLASSES), classes(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits_neither_overflow_nor_vanish(dtype: torch.dtype, label_smoothing: float) -> None:
    """The largest on one rank, so that those of the others' sums are nothing beside it; and all of them far off.

    What ranks say is rounded at the size of the logits: so is the loss.
    """
    logits, targets = drawn(4, NUM_CLASSES), classes(4)
    logits[0, 0], logits[1, -1], logits[2, 5] = 1e4, 1e4, -1e4
    logits[3] += 1e4 * torch.tensor([1, -1]).repeat_interleave(NUM_CLASSES // 2)
    tolerance = max(TOLERANCES[dtype], 4e4 * torch.finfo(max(dtype, torch.float32, key=lambda t: t.itemsize)).eps)
    for shift in (0.0, 1e4, -1e4):
        for n in (1, 2, 4):
            want = assert_alike(n, (logits + shift).to(dtype), targets, tolerance, label_smoothing=label_smoothing)
            assert want.isfinite()


def test_logits_of_minus_infinity() -> None:
    """Classes that are ruled out, of which a rank may have nothing else: rows that are padding."""
    targets = torch.tensor([0, 2, 1, 2])
    for n in (1, 2, 3, 4):
        for first in (3, 7, 11):
            logits = drawn(4, NUM_CLASSES)
            logits[:, first:] = -torch.inf
            assert assert_alike(n, logits, targets).isfinite()
        assert assert_alike(n, logits, torch.tensor([0, 11, 1, 2])).isinf()  # a target that is ruled out


def test_a_nan_is_not_hidden() -> None:
    logits = drawn(4, NUM_CLASSES)
    logits[1, 7] = torch.nan
    assert assert_alike(3, logits, classes(4)).isnan()


@settings(max_examples=80)
@given(st.data())
def test_any_logits_and_targets(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    num_positions, num_own = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    num_classes = n * num_own
    shape = (num_positions, num_classes)
    flat = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=math.prod(shape), max_size=math.prod(shape)))
    each = st.one_of(st.integers(0, num_classes - 1), st.just(-100))
    targets = torch.tensor(data.draw(st.lists(each, min_size=num_positions, max_size=num_positions)))
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    logits = torch.tensor(flat, dtype=torch.float64).view(shape)
    if bool((targets == -100).all()):
        targets[0] = 0
    assert_alike(n, logits, targets, 1e-9, label_smoothing=smoothing)


# --- as any function of torch ----------------------------------------------------------------------------------------


def test_neither_logits_nor_targets_nor_the_gradient_are_changed_and_any_layout_is_right() -> None:
    joined, targets = drawn(2, 6, NUM_CLASSES), classes(2, 6)
    want, gradient = by_torch(joined, targets)

    def work(rank: Rank) -> None:
        mine = joined.chunk(2, -1)[rank.index]
        assert not mine.is_contiguous()
        others = mine.transpose(0, 1).contiguous().transpose(0, 1), mine.contiguous(), mine
        for one in others:
            for aim in (targets, targets.t().contiguous().t()):
                x, before = one.detach().requires_grad_(), (one.clone(), aim.clone())
                loss = vocab_parallel_cross_entropy(x, aim, rank.comm)
                loss.backward()
                assert torch.equal(one, before[0])
                assert torch.equal(aim, before[1])
                torch.testing.assert_close(loss.detach(), want, rtol=0, atol=1e-12)
                torch.testing.assert_close(x.grad, gradient.chunk(2, -1)[rank.index], rtol=0, atol=1e-12)

    World(2, "cpu").run(work)


def test_backward_twice_through_one_graph_gives_the_same() -> None:
    logits, targets = drawn(3, NUM_CLASSES), classes(3)
    gradient = by_torch(logits, targets, label_smoothing=0.1)[1]

    def work(rank: Rank) -> list[Tensor]:
        mine = logits.chunk(2, -1)[rank.index].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(mine, targets, rank.comm, label_smoothing=0.1)
        return [torch.autograd.grad(loss, mine, retain_graph=True)[0] for _ in range(2)]

    for index, (first, second) in enumerate(World(2, "cpu").run(work)):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, gradient.chunk(2, -1)[index], rtol=0, atol=1e-12)


def test_logits_may_be_changed_once_the_loss_is_there() -> None:
    """To the bit or with an error, as torch does it: never with a wrong gradient."""
    logits, targets = drawn(3, NUM_CLASSES), classes(3)
    gradient = by_torch(logits, targets)[1]

    def work(rank: Rank) -> bool:
        leaf = logits.chunk(2, -1)[rank.index].clone().requires_grad_()
        mine = leaf * 1
        loss = vocab_parallel_cross_entropy(mine, targets, rank.comm)
        mine.zero_()
        try:
            loss.backward()
        except RuntimeError as error:
            return "modified by an inplace operation" in str(error)
        assert leaf.grad is not None
        return bool((leaf.grad - gradient.chunk(2, -1)[rank.index]).abs().max() < 1e-12)  # pragma: no cover

    assert World(2, "cpu").run(work) == [True, True]


def test_without_gradients_it_is_the_same_and_keeps_nothing() -> None:
    logits, targets = drawn(3, NUM_CLASSES), classes(3)
    want = by_torch(logits, targets)[0]

    def work(rank: Rank) -> None:
        mine = logits.chunk(2, -1)[rank.index].contiguous()
        losses = [vocab_parallel_cross_entropy(mine, targets, rank.comm)]
        with torch.no_grad():
            losses.append(vocab_parallel_cross_entropy(mine.clone().requires_grad_(), targets, rank.comm))
        for loss in losses:
            assert not loss.requires_grad
            torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)

    World(2, "cpu").run(work)


# --- what is said: never the logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("num_own", [1, 50])
@pytest.mark.parametrize(
    ("dtype", "label_smoothing", "position_bytes"),
    [
        (torch.float32, 0.0, 8),
        (torch.float32, 0.1, 12),
        (torch.bfloat16, 0.0, 8),
        (torch.bfloat16, 1.0, 12),
        (torch.float64, 0.0, 16),
        (torch.float64, 0.1, 24),
    ],
)
def test_bytes_of_a_position_whatever_the_number_of_classes(
    n: int, num_own: int, dtype: torch.dtype, label_smoothing: float, position_bytes: int
) -> None:
    logits, targets = drawn(2, 7, n * num_own).to(dtype), classes(2, 7, num_classes=n * num_own)
    targets[0, 0] = -100  # those that are ignored are sent too
    world = World(n, "cpu")

    def work(rank: Rank) -> int:
        mine = logits.chunk(n, -1)[rank.index].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(mine, targets, rank.comm, label_smoothing=label_smoothing)
        num_forward = len(rank.comm.ledger.messages)
        loss.backward()
        return num_forward

    assert world.run(work) == [1] * n
    size = (n - 1) * 14 * position_bytes
    for ledger in world.ledgers:
        assert [m[0] for m in ledger.messages] == ["all_gather"]
        assert [(m.num_messages, m.sent_bytes, m.received_bytes) for m in ledger.messages] == [(n - 1, size, size)]


# --- what it refuses -------------------------------------------------------------------------------------------------


def refused(n: int, logits: Tensor, targets: Tensor, **options: Any) -> str:
    world = World(n, "cpu")
    with pytest.raises(MplabError) as caught:
        world.run(lambda rank: vocab_parallel_cross_entropy(logits, targets, rank.comm, **options))
    assert not any(ledger.messages for ledger in world.ledgers), "before anything is sent"
    return str(caught.value)


@pytest.mark.parametrize(
    ("logits", "targets"),
    [((6, 4), (5,)), ((2, 3, 4), (6,)), ((6, 4), (2, 3)), ((6, 4), (6, 1)), ((6, 4), ()), ((6, 4), (6, 4))],
)
def test_shapes_that_do_not_fit(logits: tuple[int, ...], targets: tuple[int, ...]) -> None:
    said = refused(2, torch.zeros(logits), torch.zeros(targets, dtype=torch.long))
    assert f"logits of shape {logits} and targets of shape {targets}" in said


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("place", ["below", "above", "far"])
def test_a_target_that_is_no_class(n: int, place: str) -> None:
    wrong = {"below": -1, "above": 4 * n, "far": 10**6}[place]
    targets = torch.tensor([0, wrong, 2])
    said = refused(n, torch.zeros(3, 4), targets)
    assert f"targets from {min(wrong, 0)} to {max(wrong, 2)}" in said
    assert f"the {n} ranks have logits for {4 * n} classes, 0 to {4 * n - 1}" in said
    assert "vocab_size" in said
    assert "targets from" in refused(n, torch.zeros(4, 4), torch.tensor([0, wrong, 2, -100]))
    assert "targets from -100" in refused(n, torch.zeros(3, 4), torch.tensor([0, -100, 2]), ignore_index=1)
    World(n, "cpu").run(
        lambda rank: vocab_parallel_cross_entropy(torch.zeros(1, 4), torch.tensor([4 * n - 1]), rank.comm)
    )


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1, math.nan])
def test_a_smoothing_out_of_its_range(label_smoothing: float) -> None:
    said = refused(2, torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), label_smoothing=label_smoothing)
    assert f"label_smoothing {label_smoothing}: must be from 0 to 1" in said
