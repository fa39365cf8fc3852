"""Layers of which every rank has a part: what they give, and what they send, held to the whole layer of one process."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn
from whole_layers import (
    CPU,
    KINDS,
    NUM_IN,
    NUM_OUT,
    SHAPE,
    Conv1D,
    Seen,
    close,
    cut_loss,
    drawn,
    follow,
    joined_part,
    loss_of,
    of_one_entry,
    seeded,
    three,
)

from mplab import MplabError, World
from mplab.comm import Communicator
from mplab.parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from mplab.parallel.cut import Cut, TensorAxis, cuts_of
from mplab.parallel.dropout import SeededDropout
from mplab.parallel.tensor_layers import Entry, is_linear, is_transposed, sizes_of
from mplab.plan.traffic import chunk_lengths, direct_traffic
from mplab.world import Rank

# --- cuts ------------------------------------------------------------------------------------------------------------


def test_which_parameters_are_cut_and_how() -> None:
    def work(rank: Rank) -> None:
        column = ColumnParallelLinear(seeded(nn.Linear, 4, 6), rank.comm, num_parts=3)
        row = RowParallelLinear(seeded(nn.Linear, 6, 4), rank.comm)
        transposed = (
            ColumnParallelLinear(seeded(Conv1D, 4, 6), rank.comm),
            RowParallelLinear(seeded(Conv1D, 6, 4, bias=True), rank.comm),
        )
        embedding = VocabParallelEmbedding(seeded(nn.Embedding, 6, 4), rank.comm)
        model = nn.ModuleList([column, row, *transposed, embedding, nn.Linear(2, 2, device="meta")])
        assert cuts_of(model) == {
            column.weight: Cut(0, 3),
            column.bias: Cut(0, 3),
            row.weight: Cut(1),
            transposed[0].weight: Cut(1),
            transposed[0].bias: Cut(0),
            transposed[1].weight: Cut(0),
            embedding.weight: Cut(0),
        }
        assert {name for name, _ in column.named_parameters()} == {"weight", "bias"}
        assert set(column.state_dict()) == set(row.state_dict()) == {"weight", "bias"}

    World(2, "cpu").run(work)


def test_what_counts_as_a_linear_layer() -> None:
    with torch.device("meta"):
        linear, conv, other = nn.Linear(4, 6), Conv1D(4, 6), nn.Conv1d(4, 6, 1)
    assert (is_linear(linear), is_linear(conv), is_linear(other)) == (True, True, False)
    assert (is_transposed(linear), is_transposed(conv)) == (False, True)
    assert sizes_of(linear) == sizes_of(conv) == (4, 6)


# --- column-parallel -------------------------------------------------------------------------------------------------

COLUMN_WAYS = [
    (kind, num_parts, gather_output, sequence_parallel, overlap)
    for kind, num_parts, gather_output, sequence_parallel, overlap in itertools.product(
        KINDS, (1, 3), (False, True), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "num_parts", "gather_output", "sequence_parallel", "overlap"), COLUMN_WAYS)
def test_a_column_parallel_layer_is_the_whole_layer(
    kind: str, num_parts: int, gather_output: bool, sequence_parallel: bool, overlap: bool, n: int
) -> None:
    x, whole = drawn(SHAPE), seeded(KINDS[kind], NUM_IN, NUM_OUT)
    want = follow(whole, x)
    options = {"num_parts": num_parts, "gather_output": gather_output, "overlap": overlap}

    def work(rank: Rank) -> Seen:
        layer = ColumnParallelLinear(whole, rank.comm, sequence_parallel=sequence_parallel, **options)
        mine = x.chunk(n, 1)[rank.index] if sequence_parallel else x
        part = lambda y: joined_part(y, rank.index, n, num_parts)  # noqa: E731
        return follow(layer, mine, loss_of if gather_output else lambda y: cut_loss(y, want.output.shape, part))

    for rank, seen in enumerate(World(n, "cpu").run(work)):
        close(seen.output, want.output if gather_output else joined_part(want.output, rank, n, num_parts))
        assert want.input_gradient is not None
        close(seen.input_gradient, want.input_gradient.chunk(n, 1)[rank] if sequence_parallel else want.input_gradient)
        assert seen.gradients.keys() == want.gradients.keys()
        for name, grad in want.gradients.items():
            dim = -1 if kind == "Conv1D" else 0
            close(seen.gradients[name], joined_part(grad, rank, n, num_parts, dim))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_with_and_without_a_bias_and_of_any_shape_and_dtype(overlap: bool, bias: bool) -> None:
    """Outputs that are not made for the sequence: the layer alone, as `nn.Linear` takes its inputs."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        whole = seeded(nn.Linear, 6, 8, dtype=dtype, bias=bias)
        for shape in ((6,), (3, 6), (2, 3, 2, 6), (0, 6)):
            x = drawn(shape, dtype=dtype)
            want = follow(whole, x)

            def work(rank: Rank, whole: nn.Module = whole, x: Tensor = x) -> tuple[Seen, Seen]:
                column = ColumnParallelLinear(whole, rank.comm, gather_output=True, overlap=overlap)
                row = RowParallelLinear(whole, rank.comm)
                return follow(column, x), follow(row, x.chunk(2, -1)[rank.index])

            for rank, (column, row) in enumerate(World(2, "cpu").run(work)):
                close([column.output, row.output], [want.output] * 2, tolerance)
                assert want.input_gradient is not None
                close(column.input_gradient, want.input_gradient, tolerance)
                close(row.input_gradient, want.input_gradient.chunk(2, -1)[rank], tolerance)
                assert column.gradients.keys() == row.gradients.keys() == want.gradients.keys()
                close(column.gradients["weight"], want.gradients["weight"].chunk(2, 0)[rank], tolerance)
                close(row.gradients["weight"], want.gradients["weight"].chunk(2, 1)[rank], tolerance)
                if bias:
                    close(column.gradients["bias"], want.gradients["bias"].chunk(2)[rank], tolerance)
                    close(row.gradients["bias"], want.gradients["bias"], tolerance)


# --- row-parallel, and the pair --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_row_parallel_layer_is_the_whole_layer_with_one_bias(kind: str, sequence_parallel: bool, n: int) -> None:
    """Where the outputs are cut, each rank has the gradient of the bias from its own positions."""
    x, whole = drawn((2, 12, NUM_OUT)), seeded(KINDS[kind], NUM_OUT, NUM_IN)
    want = follow(whole, x)

    def work(rank: Rank) -> Seen:
        layer = RowParallelLinear(whole, rank.comm, sequence_parallel)
        part = lambda y: y.chunk(n, 1)[rank.index]  # noqa: E731
        loss = (lambda y: cut_loss(y, want.output.shape, part)) if sequence_parallel else loss_of
        return follow(layer, x.chunk(n, -1)[rank.index], loss)

    seen = World(n, "cpu").run(work)
    for rank, got in enumerate(seen):
        close(got.output, want.output.chunk(n, 1)[rank] if sequence_parallel else want.output)
        assert want.input_gradient is not None
        close(got.input_gradient, want.input_gradient.chunk(n, -1)[rank])
        close(got.gradients["weight"], want.gradients["weight"].chunk(n, 0 if kind == "Conv1D" else 1)[rank])
        if not sequence_parallel:
            close(got.gradients["bias"], want.gradients["bias"])
    if sequence_parallel:
        close(torch.stack([got.gradients["bias"] for got in seen]).sum(0), want.gradients["bias"])


class Pair(nn.Module):
    """Of layers that are whole, or of those that stand in their places."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def whole_pair(kind: str = "Linear", seed: int = 0, dtype: torch.dtype = torch.float64) -> Pair:
    made = KINDS[kind]
    return Pair(
        seeded(made, NUM_IN, NUM_OUT, seed=seed, dtype=dtype),
        seeded(made, NUM_OUT, NUM_IN, seed=seed + 50, dtype=dtype),
    )


def cut_pair(whole: Pair, comm: Communicator, sequence_parallel: bool = False, overlap: bool = False) -> Pair:
    return Pair(
        ColumnParallelLinear(whole.up, comm, sequence_parallel=sequence_parallel, overlap=overlap),
        RowParallelLinear(whole.down, comm, sequence_parallel),
    )


def assert_pair(got: Seen, want: Seen, rank: int, n: int, is_transposed: bool, sequence_parallel: bool) -> None:
    """But for the row's bias with sequence parallelism, which is a part."""
    assert want.input_gradient is not None
    mine = (lambda y: y.chunk(n, 1)[rank]) if sequence_parallel else (lambda y: y)
    close(got.output, mine(want.output))
    close(got.input_gradient, mine(want.input_gradient))
    for name, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
        place = 1 - dim if is_transposed and name != "up.bias" else dim
        close(got.gradients[name], want.gradients[name].chunk(n, place)[rank])
    if not sequence_parallel:
        close(got.gradients["down.bias"], want.gradients["down.bias"])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_pair_is_the_whole_pair(kind: str, sequence_parallel: bool, overlap: bool, n: int) -> None:
    x, whole = drawn(SHAPE), whole_pair(kind)
    want = follow(whole, x)

    def work(rank: Rank) -> Seen:
        part = lambda y: y.chunk(n, 1)[rank.index] if sequence_parallel else y  # noqa: E731
        pair = cut_pair(whole, rank.comm, sequence_parallel, overlap)
        return follow(pair, part(x).clone(), lambda y: cut_loss(y, want.output.shape, part))

    for rank, got in enumerate(World(n, "cpu").run(work)):
        assert_pair(got, want, rank, n, kind == "Conv1D", sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_overlap_changes_no_bit(sequence_parallel: bool) -> None:
    x, whole = drawn(SHAPE, dtype=torch.float32), whole_pair(dtype=torch.float32)

    def work(rank: Rank) -> list[Seen]:
        mine = x.chunk(2, 1)[rank.index] if sequence_parallel else x
        return [follow(cut_pair(whole, rank.comm, sequence_parallel, overlap), mine) for overlap in (False, True)]

    for off, on in World(2, "cpu").run(work):
        close(on.output, off.output, 0)
        close(on.input_gradient, off.input_gradient, 0)
        assert on.gradients.keys() == off.gradients.keys()
        close(on.gradients, off.gradients, 1e-6)  # one product of all positions in place of one a sample


@pytest.mark.parametrize("overlap", [False, True])
def test_non_contiguous_inputs_are_right_and_nothing_is_changed(overlap: bool) -> None:
    """Nor the gradient that comes from later, whatever its layout."""
    x, whole = drawn((12, 2, NUM_IN)).transpose(0, 1), whole_pair()
    assert not x.is_contiguous()
    grad = drawn((2, NUM_IN, 12)).transpose(1, 2)
    want = follow(whole, x, lambda y: (y * grad).sum())
    kept = x.clone(), grad.clone()

    def work(rank: Rank) -> Seen:
        pair = cut_pair(whole, rank.comm, overlap=overlap)
        leaf = x.detach().requires_grad_()
        y = pair(leaf)
        before = y.detach().clone()
        y.backward(grad)
        assert torch.equal(y, before)
        return Seen(before, leaf.grad, {name: p.grad for name, p in pair.named_parameters() if p.grad is not None})

    for rank, got in enumerate(World(2, "cpu").run(work)):
        assert_pair(got, want, rank, 2, False, False)
    assert torch.equal(x, kept[0])
    assert torch.equal(grad, kept[1])


# --- graphs of every kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_graphs_that_overlap_in_time(overlap: bool, sequence_parallel: bool) -> None:
    """Two forwards before their backwards, a second backward through one graph, and gradients that add up."""
    xs, whole = [drawn(SHAPE, seed) for seed in (1, 2)], whole_pair()
    whole.zero_grad()
    for x, times in zip(xs, (2, 1), strict=True):
        for _ in range(times):
            loss_of(whole(x)).backward()
    want = {name: p.grad for name, p in whole.named_parameters()}

    def work(rank: Rank) -> dict[str, Tensor | None]:
        part = lambda y: y.chunk(2, 1)[rank.index] if sequence_parallel else y  # noqa: E731
        pair = cut_pair(whole, rank.comm, sequence_parallel, overlap)
        leaves = [part(x).clone().requires_grad_() for x in xs]
        losses = [cut_loss(pair(leaf), SHAPE, part) for leaf in leaves]
        losses[0].backward(retain_graph=True)
        assert leaves[0].grad is not None
        once = leaves[0].grad.clone()
        losses[1].backward()
        losses[0].backward()
        close(leaves[0].grad, 2 * once)
        return {name: p.grad for name, p in pair.named_parameters()}

    for rank, got in enumerate(World(2, "cpu").run(work)):
        close(got["up.weight"], want["up.weight"].chunk(2)[rank])
        close(got["up.bias"], want["up.bias"].chunk(2)[rank])
        close(got["down.weight"], want["down.weight"].chunk(2, 1)[rank])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_layer_in_two_places_and_an_input_of_two_layers(overlap: bool) -> None:
    """Layers with entries of their own: each place sends for itself."""
    x, whole, other = drawn((3, NUM_IN)), whole_pair(), whole_pair(seed=1)
    leaf = x.clone().requires_grad_()
    loss_of(whole(whole(leaf)) + other(leaf)).backward()

    def work(rank: Rank) -> tuple[Tensor | None, ...]:
        one, two = (cut_pair(pair, rank.comm, overlap=overlap) for pair in (whole, other))
        mine = x.clone().requires_grad_()
        loss_of(one(one(mine)) + two(mine)).backward()
        return mine.grad, one.up.weight.grad, two.up.weight.grad, one.down.bias.grad

    for rank, (input_gradient, *gradients) in enumerate(World(2, "cpu").run(work)):
        close(input_gradient, leaf.grad)
        close(gradients[0], whole.up.weight.grad.chunk(2)[rank])
        close(gradients[1], other.up.weight.grad.chunk(2)[rank])
        close(gradients[2], whole.down.bias.grad)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_activations_that_are_computed_once_more(sequence_parallel: bool, overlap: bool) -> None:
    x, whole = drawn(SHAPE), whole_pair()
    want = follow(whole, x)

    def work(rank: Rank) -> Seen:
        part = lambda y: y.chunk(2, 1)[rank.index] if sequence_parallel else y  # noqa: E731
        pair = cut_pair(whole, rank.comm, sequence_parallel, overlap)
        leaf = part(x).clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(pair, leaf, use_reentrant=False, preserve_rng_state=False)
        cut_loss(y, SHAPE, part).backward()
        return Seen(y.detach(), leaf.grad, {name: p.grad for name, p in pair.named_parameters() if p.grad is not None})

    for rank, got in enumerate(World(2, "cpu").run(work)):
        assert_pair(got, want, rank, 2, False, sequence_parallel)


@pytest.mark.parametrize("overlap", [False, True])
def test_under_autocast(overlap: bool) -> None:
    """Products in bfloat16, gradients in float32: as of the whole layers."""
    x, whole = drawn(SHAPE, dtype=torch.float32), whole_pair(dtype=torch.float32)

    class Cast(Pair):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    def of(pair: Pair) -> Seen:
        return follow(Cast(pair.up, pair.down), x, lambda y: loss_of(y.float()))

    want = of(whole)

    def work(rank: Rank) -> Seen:
        pair = cut_pair(whole, rank.comm, overlap=overlap)
        with torch.autocast("cpu", torch.bfloat16):
            assert pair.up(x).dtype == torch.bfloat16
        return of(pair)

    for rank, got in enumerate(World(2, "cpu").run(work)):
        assert {grad.dtype for grad in got.gradients.values()} == {torch.float32}
        close(got.output.float(), want.output.float(), 0.1)
        close(got.input_gradient, want.input_gradient, 0.1)
        close(got.gradients["up.weight"], want.gradients["up.weight"].chunk(2)[rank], 0.1)


@pytest.mark.parametrize("overlap", [False, True])
def test_frozen_weights_stay_frozen_and_hand_gradients_on(overlap: bool) -> None:
    x = drawn(SHAPE)
    for frozen in (["up.weight"], ["up.weight", "up.bias"], ["up.bias", "down.weight"], ["down.bias"]):
        whole = whole_pair()
        for name in frozen:
            whole.get_parameter(name).requires_grad_(False)
        want = follow(whole, x)

        def work(rank: Rank, whole: Pair = whole) -> Seen:
            return follow(cut_pair(whole, rank.comm, overlap=overlap), x)

        for rank, got in enumerate(World(2, "cpu").run(work)):
            assert got.gradients.keys() == want.gradients.keys()
            close(got.input_gradient, want.input_gradient)
            for name, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
                if name in want.gradients:
                    close(got.gradients[name], want.gradients[name].chunk(2, dim)[rank])


@pytest.mark.parametrize("overlap", [False, True])
def test_an_input_that_needs_no_gradient_sends_none(overlap: bool) -> None:
    x, whole = drawn(SHAPE), whole_pair()
    want = follow(whole, x)
    world = World(2, "cpu")

    def work(rank: Rank) -> list[Tensor | None]:
        pair = cut_pair(whole, rank.comm, overlap=overlap)
        rank.comm.ledger.messages.clear()
        loss_of(pair(x)).backward()
        return [pair.up.weight.grad, pair.up.bias.grad]

    for rank, (weight, bias) in enumerate(world.run(work)):
        close(weight, want.gradients["up.weight"].chunk(2)[rank])
        close(bias, want.gradients["up.bias"].chunk(2)[rank])
        assert [m.op for m in world.ledgers[rank].messages] == ["all_reduce_"]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_without_gradients(sequence_parallel: bool, overlap: bool) -> None:
    x, whole = drawn(SHAPE), whole_pair()
    want = whole(x).detach()
    world = World(2, "cpu")

    def work(rank: Rank) -> list[Tensor]:
        pair = cut_pair(whole, rank.comm, sequence_parallel, overlap)
        mine = x.chunk(2, 1)[rank.index] if sequence_parallel else x
        with torch.no_grad():
            outputs = [pair(mine)]
        with torch.inference_mode():
            outputs.append(pair(mine))
        assert not any(y.requires_grad for y in outputs)
        return [*outputs, pair(mine).detach()]  # and again with them

    for rank, outputs in enumerate(world.run(work)):
        for y in outputs:
            close(y, want.chunk(2, 1)[rank] if sequence_parallel else want)


# --- where an activation enters --------------------------------------------------------------------------------------


ENTRIES = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize(("sequence_parallel", "overlap"), ENTRIES)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_three_layers_of_one_entry_send_once(sequence_parallel: bool, overlap: bool, n: int) -> None:
    x, whole = drawn((2, 4, NUM_IN)), of_one_entry()
    leaf = x.clone().requires_grad_()
    sum(loss_of(layer(leaf)) for layer in whole).backward()
    world = World(n, "cpu")

    def work(rank: Rank) -> tuple[Tensor | None, ...]:
        entry = Entry(TensorAxis(rank.comm), sequence_parallel, overlap)
        layers = three(entry, whole)
        mine = (x.chunk(n, 1)[rank.index] if sequence_parallel else x).clone().requires_grad_()
        rank.comm.ledger.messages.clear()
        entered = entry(mine)
        assert entry(entered) is entered
        part = lambda y: y.chunk(n, -1)[rank.index]  # noqa: E731
        sizes = [layer.weight.shape[0] for layer in whole]
        sum(cut_loss(layer(entered), (2, 4, size), part) for layer, size in zip(layers, sizes, strict=True)).backward()
        return mine.grad, *(layer.weight.grad for layer in layers), *(layer.bias.grad for layer in layers)

    want = [layer.weight.grad for layer in whole] + [layer.bias.grad for layer in whole]
    for rank, (grad, *of_layers) in enumerate(world.run(work)):
        close(grad, leaf.grad.chunk(n, 1)[rank] if sequence_parallel else leaf.grad)
        close(of_layers, [gradient.chunk(n)[rank] for gradient in want])
        ops = ["all_gather", "reduce_scatter"] if sequence_parallel else ["all_reduce"]
        assert [m.op for m in world.ledgers[rank].messages] == ops


@pytest.mark.parametrize(("sequence_parallel", "overlap"), ENTRIES)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_layer_that_reads_another_tensor_than_its_siblings(
    sequence_parallel: bool, overlap: bool, order: tuple[int, ...]
) -> None:
    """Cross-attention: the second layer reads what others do not, whenever its turn comes."""
    x, memory, whole = drawn((2, 4, NUM_IN)), drawn((2, 4, NUM_IN), 1), of_one_entry()
    leaves = [x.clone().requires_grad_(), memory.clone().requires_grad_()]
    sum(loss_of(whole[i](leaves[i == 1])) for i in range(3)).backward()

    def work(rank: Rank) -> list[Tensor | None]:
        entry = Entry(TensorAxis(rank.comm), sequence_parallel, overlap)
        layers = three(entry, whole)
        mine = [(t.chunk(2, 1)[rank.index] if sequence_parallel else t).clone().requires_grad_() for t in (x, memory)]
        entered = entry(mine[0])
        part = lambda y: y.chunk(2, -1)[rank.index]  # noqa: E731
        losses = []
        for i in order:
            y = layers[i](mine[1] if i == 1 else entered)
            losses.append(cut_loss(y, (2, 4, whole[i].weight.shape[0]), part))
        sum(losses).backward()
        return [*(leaf.grad for leaf in mine), *(layer.weight.grad for layer in layers)]

    for rank, (*of_inputs, query, key, value) in enumerate(World(2, "cpu").run(work)):
        part = (lambda y: y.chunk(2, 1)[rank]) if sequence_parallel else (lambda y: y)  # noqa: B023
        close(of_inputs, [part(leaf.grad) for leaf in leaves])
        close([query, key, value], [layer.weight.grad.chunk(2)[rank] for layer in whole])


@pytest.mark.parametrize(("sequence_parallel", "overlap"), ENTRIES)
def test_layers_that_read_what_has_not_entered(sequence_parallel: bool, overlap: bool) -> None:
    """Nobody called the entry first: each layer's own reading is right."""
    x, whole = drawn((2, 4, NUM_IN)), of_one_entry()
    leaf = x.clone().requires_grad_()
    sum(loss_of(layer(leaf)) for layer in whole).backward()

    def work(rank: Rank) -> list[Tensor | None]:
        entry = Entry(TensorAxis(rank.comm), sequence_parallel, overlap)
        layers = three(entry, whole)
        mine = (x.chunk(2, 1)[rank.index] if sequence_parallel else x).clone().requires_grad_()
        part = lambda y: y.chunk(2, -1)[rank.index]  # noqa: E731
        sum(
            cut_loss(layer(mine), (2, 4, one.weight.shape[0]), part) for layer, one in zip(layers, whole, strict=True)
        ).backward()
        return [mine.grad, *(layer.weight.grad for layer in layers)]

    for rank, (grad, *weights) in enumerate(World(2, "cpu").run(work)):
        close(grad, leaf.grad.chunk(2, 1)[rank] if sequence_parallel else leaf.grad)
        close(weights, [layer.weight.grad.chunk(2)[rank] for layer in whole])


@pytest.mark.parametrize(("sequence_parallel", "overlap"), ENTRIES)
def test_a_layer_called_twice_with_what_entered_once_and_one_that_is_not_called(
    sequence_parallel: bool, overlap: bool
) -> None:
    """A layer that is shared, and a branch that is not taken."""
    x, whole = drawn((2, 4, NUM_IN)), of_one_entry()
    leaf = x.clone().requires_grad_()
    (loss_of(whole[0](leaf)) + loss_of(whole[0](leaf) * 2) + loss_of(whole[1](leaf))).backward()

    def work(rank: Rank) -> list[Tensor | None]:
        entry = Entry(TensorAxis(rank.comm), sequence_parallel, overlap)
        first, second, third = three(entry, whole)
        mine = (x.chunk(2, 1)[rank.index] if sequence_parallel else x).clone().requires_grad_()
        entered = entry(mine)
        part = lambda y: y.chunk(2, -1)[rank.index]  # noqa: E731
        outputs = (first(entered), 12), (first(entered) * 2, 12), (second(entered), 24)
        sum(cut_loss(y, (2, 4, size), part) for y, size in outputs).backward()
        assert third.weight.grad is None
        copied = copy.deepcopy(nn.ModuleList([first, second, third]))
        assert torch.equal(copied[2].weight, third.weight)
        return [mine.grad, first.weight.grad, second.weight.grad]

    for rank, (grad, *weights) in enumerate(World(2, "cpu").run(work)):
        close(grad, leaf.grad.chunk(2, 1)[rank] if sequence_parallel else leaf.grad)
        close(weights, [layer.weight.grad.chunk(2)[rank] for layer in whole[:2]])


@pytest.mark.parametrize("overlap", [False, True])
def test_what_entered_without_gradients_can_be_read_with_them(overlap: bool) -> None:
    """A frozen part of a model before a trained layer."""
    x, (whole, *_) = drawn((2, 4, NUM_IN)), of_one_entry()
    want = follow(whole, x)

    def work(rank: Rank) -> Tensor | None:
        entry = Entry(TensorAxis(rank.comm), overlap=overlap)
        (layer,) = three(entry, [whole])
        with torch.no_grad():
            entered = entry(x)
        cut_loss(layer(entered), want.output.shape, lambda y: y.chunk(2, -1)[rank.index]).backward()
        return layer.weight.grad

    for rank, grad in enumerate(World(2, "cpu").run(work)):
        close(grad, want.gradients["weight"].chunk(2)[rank])


@pytest.mark.parametrize("overlap", [False, True])
def test_an_entry_keeps_no_activation(overlap: bool) -> None:
    def work(rank: Rank) -> None:
        entry = Entry(TensorAxis(rank.comm), overlap=overlap)
        layers = three(entry, of_one_entry())
        x = drawn((2, 4, NUM_IN)).requires_grad_()
        entered = entry(x)
        kept = weakref.ref(entered), weakref.ref(x)
        torch.stack([layer(entered).sum() for layer in layers]).sum().backward()
        del x, entered
        gc.collect()
        assert [ref() for ref in kept] == [None, None]

    World(1, "cpu").run(work)


# --- what is said ----------------------------------------------------------------------------------------------------


def blocks(op: str, numel: int, n: int, item_bytes: int) -> list[int]:
    return [length * item_bytes for length in chunk_lengths(numel, n)]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_message_of_the_pair_and_its_bytes(sequence_parallel: bool, overlap: bool, n: int) -> None:
    """One a direction; with sequence parallelism two, of the same bytes together."""
    world = World(n, "cpu")
    x, whole = drawn(SHAPE, dtype=torch.float32), whole_pair(dtype=torch.float32)

    def work(rank: Rank) -> int:
        pair = cut_pair(whole, rank.comm, sequence_parallel, overlap)
        mine = x.chunk(n, 1)[rank.index] if sequence_parallel else x
        rank.comm.ledger.messages.clear()
        y = pair(mine.clone().requires_grad_())
        num_forward = len(rank.comm.ledger.messages)
        loss_of(y).backward()
        return num_forward

    forward, backward = ["all_reduce_"], ["all_reduce"]
    if sequence_parallel:
        forward = backward = ["all_gather", "reduce_scatter"]
    for rank, num_forward in enumerate(world.run(work)):
        messages = world.ledgers[rank].messages
        assert [m.op for m in messages[:num_forward]] == forward
        assert [m.op for m in messages[num_forward:]] == backward
        for m in messages:
            want = direct_traffic(m.op, rank, blocks(m.op, x.numel(), n, 4))
            assert (m.num_messages, m.sent_bytes, m.received_bytes) == want[:2] + want[3:]
        assert sum(m.sent_bytes for m in messages) == 4 * (n - 1) * x.nbytes // n


def test_gathered_outputs_cost_their_bytes_more() -> None:
    world = World(3, "cpu")

    def work(rank: Rank) -> None:
        layer = ColumnParallelLinear(seeded(nn.Linear, 4, 6), rank.comm, gather_output=True)
        rank.comm.ledger.messages.clear()
        loss_of(layer(drawn((5, 4)).requires_grad_())).backward()

    world.run(work)
    for ledger in world.ledgers:
        assert [(m.op, m.sent_bytes) for m in ledger.messages[:1]] == [("all_gather", 2 * 5 * 2 * 8)]
        assert [m.op for m in ledger.messages[1:]] == ["all_reduce"]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_making_a_layer_scatters_what_is_cut(n: int) -> None:
    """And nobody gets more of it than his part."""
    world = World(n, "cpu")

    def work(rank: Rank) -> None:
        ColumnParallelLinear(seeded(nn.Linear, 5, 6), rank.comm)
        VocabParallelEmbedding(seeded(nn.Embedding, 6, 5), rank.comm)

    world.run(work)
    for rank, ledger in enumerate(world.ledgers):
        assert [m.op for m in ledger.messages] == ["scatter"] * 3
        for m, size in zip(ledger.messages, (5 * 6, 6, 6 * 5), strict=True):
            want = direct_traffic("scatter", rank, [8 * size // n] * n, 0)
            assert (m.num_messages, m.sent_bytes, m.received_bytes) == want[:2] + want[3:]


# --- making them -----------------------------------------------------------------------------------------------------


def test_ranks_that_begin_with_different_weights_have_those_of_rank_0() -> None:
    """Of biases that are not cut too: else each rank would go on with an output of its own."""
    x, ids = drawn(SHAPE), torch.arange(12).view(3, 4)
    whole, table = whole_pair(), seeded(nn.Embedding, 12, 3)
    want = whole(x).detach(), table(ids).detach()

    def work(rank: Rank) -> tuple[Tensor, Tensor]:
        mine = whole_pair(seed=rank.index)
        embedding = VocabParallelEmbedding(seeded(nn.Embedding, 12, 3, seed=rank.index), rank.comm)
        assert rank.index == 0 or not torch.equal(mine.down.bias, whole.down.bias)
        return cut_pair(mine, rank.comm)(x).detach(), embedding(ids).detach()

    for got in World(3, "cpu").run(work):
        close(got, want)


@pytest.mark.parametrize("n", [1, 2])
def test_the_whole_layer_is_not_changed_and_shares_no_memory(n: int) -> None:
    def work(rank: Rank) -> None:
        whole = [seeded(nn.Linear, 4, 6), seeded(nn.Linear, 6, 4), seeded(nn.Embedding, 6, 4)]
        before = [copy.deepcopy(module.state_dict()) for module in whole]
        made = [
            ColumnParallelLinear(whole[0], rank.comm),
            RowParallelLinear(whole[1], rank.comm),
            VocabParallelEmbedding(whole[2], rank.comm),
        ]
        for layer in made:
            for p in layer.parameters():
                assert p.is_leaf
                assert p.is_contiguous()
                assert p.untyped_storage().nbytes() == p.nbytes, "no more memory than its part"
                p.data.fill_(7)
        for module, state in zip(whole, before, strict=True):
            close(module.state_dict(), state, 0)

    World(n, "cpu").run(work)


def test_a_copy_works_and_shares_the_communicator() -> None:
    """After a step too, of every kind of layer; it has weights of its own."""
    x, ids = drawn((2, 4, NUM_IN)), torch.arange(8).view(2, 4)

    def work(rank: Rank) -> None:
        pair = cut_pair(whole_pair(), rank.comm, overlap=True)
        embedding = VocabParallelEmbedding(seeded(nn.Embedding, 12, NUM_IN), rank.comm)
        model = nn.Sequential(embedding, pair, SeededDropout(0.5, 3, CPU))
        follow(pair, x)
        copied = copy.deepcopy(model)
        for one, other in zip(model.modules(), copied.modules(), strict=True):
            assert one is not other
            if hasattr(one, "comm"):
                assert other.comm is one.comm is rank.comm
                assert other.axis is one.axis, "so that one `connect` reaches the layer and its entry"
        ours, theirs = model(ids), copied(ids)
        assert torch.equal(ours, theirs), "of dropout too"
        loss_of(theirs).backward()
        assert all(p.grad is not None for p in copied.parameters())
        first = follow(pair, x)
        with torch.no_grad():
            for p in copied.parameters():
                p.zero_()
        assert torch.equal(follow(pair, x).output, first.output)
        assert not copied(ids).any()
        copied.load_state_dict(model.state_dict())
        close(follow(copied[1], x), first, 0)

    World(2, "cpu").run(work)


def test_sizes_that_the_ranks_do_not_divide() -> None:
    def said(make: Callable[[Communicator], nn.Module], n: int = 4) -> str:
        with pytest.raises(MplabError) as caught:
            World(n, "cpu").run(lambda rank: make(rank.comm))
        return str(caught.value)

    linear, conv, table = seeded(nn.Linear, 6, 10), seeded(Conv1D, 6, 10), seeded(nn.Embedding, 10, 3)
    for layer in (linear, conv):
        assert "ColumnParallelLinear: 10 outputs can't be cut in 4 equal" in said(
            lambda comm, layer=layer: ColumnParallelLinear(layer, comm)
        )
        assert "RowParallelLinear: 6 inputs can't be cut in 4" in said(
            lambda comm, layer=layer: RowParallelLinear(layer, comm)
        )
    text = said(lambda comm: ColumnParallelLinear(seeded(nn.Linear, 4, 6), comm, num_parts=3), 4)
    assert "6 outputs can't be cut in 12 equal parts" in text
    assert "VocabParallelEmbedding: 10 tokens can't be cut in 4" in said(
        lambda comm: VocabParallelEmbedding(table, comm)
    )


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("padding_idx", [None, 0, 5, 6, -1])
def test_an_embedding_is_the_whole_embedding(n: int, padding_idx: int | None) -> None:
    """Tokens of every rank, the first and the last of each, some of them more than once."""
    whole = seeded(nn.Embedding, 12, 5, padding_idx=padding_idx)
    for ids in (torch.arange(24).view(4, 6) % 12, torch.tensor(7), torch.zeros(2, 0, dtype=torch.long)):
        kept = ids.clone()
        whole.zero_grad()
        want = whole(ids)
        loss_of(want).backward()

        def work(rank: Rank, ids: Tensor = ids) -> tuple[Tensor, Tensor | None]:
            layer = VocabParallelEmbedding(whole, rank.comm)
            x = layer(ids)
            loss_of(x).backward()
            return x.detach(), layer.weight.grad

        for rank, (x, grad) in enumerate(World(n, "cpu").run(work)):
            assert torch.equal(x, want)
            close(grad, whole.weight.grad.chunk(n)[rank])
        assert torch.equal(ids, kept)


@pytest.mark.parametrize("reduce_gradient", [False, True])
def test_gradients_that_are_parts_are_added_up(reduce_gradient: bool) -> None:
    """Else each rank's gradient is the whole one; and every message."""
    whole, ids = seeded(nn.Embedding, 12, 5, dtype=torch.float32), torch.arange(6).view(2, 3)
    parts = [drawn((2, 3, 5), seed, torch.float32) for seed in range(3)]
    whole(ids).backward(sum(parts[1:], start=parts[0]) if reduce_gradient else parts[0])
    world = World(3, "cpu")

    def work(rank: Rank) -> Tensor | None:
        layer = VocabParallelEmbedding(whole, rank.comm, reduce_gradient)
        rank.comm.ledger.messages.clear()
        layer(ids).backward(parts[rank.index] if reduce_gradient else parts[0])
        return layer.weight.grad

    for rank, grad in enumerate(world.run(work)):
        close(grad, whole.weight.grad.chunk(3)[rank], 1e-6)
        messages = world.ledgers[rank].messages
        assert [m.op.rstrip("_") for m in messages] == ["all_reduce"] * (1 + reduce_gradient)
        assert {(m.num_messages, m.sent_bytes, m.received_bytes) for m in messages} == {(4, 160, 160)}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_of_any_integer_dtype_and_weights_of_any_other(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 11], [6, 5]]).to(dtype)
    for weights in (torch.float32, torch.bfloat16):
        whole = seeded(nn.Embedding, 12, 4, dtype=weights)
        for x in World(2, "cpu").run(lambda rank, whole=whole: VocabParallelEmbedding(whole, rank.comm)(ids)):
            assert x.dtype == weights
            assert torch.equal(x, whole(ids))


@pytest.mark.parametrize(("wrong", "low", "high"), [(12, 3, 12), (-1, -1, 3), (10**6, 3, 10**6)])
def test_a_token_that_is_not_in_the_vocabulary(wrong: int, low: int, high: int) -> None:
    world = World(2, "cpu")

    def work(rank: Rank) -> None:
        layer = VocabParallelEmbedding(seeded(nn.Embedding, 12, 4), rank.comm)
        layer(torch.tensor([[3, wrong]]))

    with pytest.raises(MplabError, match=f"tokens from {low} to {high}, but the vocabulary goes from 0 to 11"):
        world.run(work)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_options_of_an_embedding_that_look_at_the_whole(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(MplabError, match=f"with {name}: build it without"):
        World(2, "cpu").run(lambda rank: VocabParallelEmbedding(seeded(nn.Embedding, 12, 4, **option), rank.comm))


def test_frozen_embeddings_stay_frozen() -> None:
    whole = seeded(nn.Embedding, 12, 4).requires_grad_(False)

    def work(rank: Rank) -> bool:
        layer = VocabParallelEmbedding(whole, rank.comm)
        return layer.weight.requires_grad or layer(torch.arange(12)).requires_grad

    assert World(2, "cpu").run(work) == [False, False]
