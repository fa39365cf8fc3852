"""The operators of tensor parallelism, each held to autograd of one process on the joined tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor

from mplab import World
from mplab.comm import Communicator
from mplab.errors import MplabError
from mplab.parallel import operators
from mplab.plan.traffic import direct_traffic
from mplab.world import Rank

SHAPE = (3, 5, 2)  # of which some dims are shorter than four ranks: their chunks are empty
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}


class Operator(NamedTuple):
    """What an operator does, said by one process that has all ranks' tensors.

    Args:
        call: on a rank's tensor.
        outputs: of all ranks, from all ranks' inputs, n and dim.
        is_whole: the input is the same on every rank.
        is_chunk: it is this rank's chunk.
        is_alike: what follows is the same on every rank, and counts once.
        forward, backward: the collective that each is, if any.
    """

    call: Callable[[Tensor, Communicator, int], Tensor]
    outputs: Callable[[Sequence[Tensor], int, int], Sequence[Tensor]]
    is_whole: bool = False
    is_chunk: bool = False
    is_alike: bool = False
    forward: str | None = None
    backward: str | None = None


def total(xs: Sequence[Tensor]) -> Tensor:
    return sum(xs[1:], start=xs[0])


def reduce_in_place(x: Tensor, comm: Communicator, dim: int) -> Tensor:
    """Into a result of one's own: the product is nobody else's."""
    return operators.reduce_from_(x * 1, comm)


OPERATORS = {
    "copy_to": Operator(
        lambda x, comm, dim: operators.copy_to(x, comm),
        lambda xs, n, dim: xs,
        is_whole=True,
        backward="all_reduce",
    ),
    "reduce_from": Operator(
        lambda x, comm, dim: operators.reduce_from(x, comm),
        lambda xs, n, dim: [total(xs)] * n,
        is_alike=True,
        forward="all_reduce",
    ),
    "reduce_from_": Operator(
        reduce_in_place,
        lambda xs, n, dim: [total(xs)] * n,
        is_alike=True,
        forward="all_reduce_",
    ),
    "scatter_to": Operator(
        operators.scatter_to,
        lambda xs, n, dim: [x.tensor_split(n, dim)[r] for r, x in enumerate(xs)],
        is_whole=True,
        backward="all_gather",
    ),
    "gather_from": Operator(
        operators.gather_from,
        lambda xs, n, dim: [torch.cat(list(xs), dim)] * n,
        is_chunk=True,
        is_alike=True,
        forward="all_gather",
    ),
    "all_gather": Operator(
        operators.all_gather,
        lambda xs, n, dim: [torch.cat(list(xs), dim)] * n,
        is_chunk=True,
        forward="all_gather",
        backward="reduce_scatter",
    ),
    "reduce_scatter": Operator(
        operators.reduce_scatter,
        lambda xs, n, dim: total(xs).tensor_split(n, dim),
        forward="reduce_scatter",
        backward="all_gather",
    ),
    "all_reduce": Operator(
        lambda x, comm, dim: operators.all_reduce(x, comm),
        lambda xs, n, dim: [total(xs)] * n,
        forward="all_reduce",
        backward="all_reduce",
    ),
}
HAVE_A_DIM = ("scatter_to", "gather_from", "all_gather", "reduce_scatter")


def drawn(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def given_to(operator: Operator, n: int, dim: int, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Each rank's input; every call gives new tensors."""
    if operator.is_chunk:
        return [part.clone() for part in drawn(shape, 0, dtype).tensor_split(n, dim)]
    return [drawn(shape, 0 if operator.is_whole else r, dtype) for r in range(n)]


def loss_of(y: Tensor, rank: int) -> Tensor:
    """What a rank does with an output: with weights of its own."""
    return (drawn(y.shape, 100 + rank, y.dtype) * y.sin()).sum()


Loss = Callable[[Tensor, int], Tensor]


class Seen(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]


def in_one_process(
    operator: Operator, xs: Sequence[Tensor], dim: int, loss: Loss = loss_of, num_calls: int = 1
) -> Seen:
    """Autograd over all ranks' tensors: where the input is the same on every rank, it is one tensor."""
    n = len(xs)
    leaves = [x.clone().requires_grad_() for x in xs]
    inputs = [leaves[0]] * n if operator.is_whole else leaves
    whole = torch.zeros((), dtype=xs[0].dtype)
    for _ in range(num_calls):
        outputs = list(operator.outputs(inputs, n, dim))
        whole = whole + total([loss(y, r) for r, y in enumerate(outputs[:1] if operator.is_alike else outputs)])
    whole.backward()
    gradients = [leaf.grad for leaf in ([leaves[0]] * n if operator.is_whole else leaves)]
    return Seen([y.detach() for y in outputs], [torch.zeros_like(xs[0]) if g is None else g for g in gradients])


def own(operator: Operator, rank: int) -> int:
    """Whose loss a rank computes."""
    return 0 if operator.is_alike else rank


def over_ranks(operator: Operator, xs: Sequence[Tensor], dim: int, loss: Loss = loss_of) -> Seen:
    def work(rank: Rank) -> tuple[Tensor, Tensor | None]:
        x = xs[rank.index].detach().requires_grad_()
        y = operator.call(x, rank.comm, dim)
        loss(y, own(operator, rank.index)).backward()
        return y.detach(), x.grad

    outputs, gradients = zip(*World(len(xs), "cpu").run(work), strict=True)
    return Seen(list(outputs), list(gradients))


def assert_alike(got: Seen, want: Seen, tolerance: float = 1e-12) -> None:
    for mine, theirs in zip((*got.outputs, *got.gradients), (*want.outputs, *want.gradients), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


# --- forward and backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_and_backward_are_those_of_the_joined_tensor(name: str, n: int) -> None:
    """Of sizes that n divides, does not divide, and does not reach."""
    operator = OPERATORS[name]
    for dim in (0, 1, -1) if name in HAVE_A_DIM else (0,):
        xs = given_to(operator, n, dim, SHAPE, torch.float64)
        assert_alike(over_ranks(operator, xs, dim), in_one_process(operator, xs, dim))


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(OPERATORS)),
    st.integers(1, 4),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(-4, 3),
)
def test_of_any_shape_and_dim(name: str, n: int, shape: list[int], dim: int) -> None:
    operator, dim = OPERATORS[name], dim % (2 * len(shape)) - len(shape)
    xs = given_to(operator, n, dim, shape, torch.float64)
    assert_alike(over_ranks(operator, xs, dim), in_one_process(operator, xs, dim))


def test_which_dim_is_cut_when_nothing_is_said() -> None:
    """Features by those that know whole tensors, the sequence by those of sequence parallelism."""
    x = drawn((4, 6, 2), 0)

    def work(rank: Rank) -> list[tuple[int, ...]]:
        cut = operators.scatter_to, operators.gather_from, operators.all_gather, operators.reduce_scatter
        return [tuple(operator(x, rank.comm).shape) for operator in cut]

    assert World(2, "cpu").run(work) == [[(4, 6, 1), (4, 6, 4), (4, 12, 2), (4, 3, 2)]] * 2


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", OPERATORS)
def test_dtypes_are_kept(name: str, dtype: torch.dtype) -> None:
    operator = OPERATORS[name]
    xs = given_to(operator, 3, 1, SHAPE, dtype)
    got = over_ranks(operator, xs, 1)
    assert {t.dtype for t in (*got.outputs, *got.gradients)} == {dtype}
    assert_alike(got, in_one_process(operator, xs, 1), TOLERANCES[dtype])


# --- inputs and gradients of any layout, and never changed -----------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    """The same values in another layout."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


GRADIENTS: dict[str, Loss] = {
    "contiguous": loss_of,
    "transposed": lambda y, rank: loss_of(y.transpose(0, -1), rank),
    "expanded": lambda y, rank: y.sum() * (1 + rank),
    "of every second": lambda y, rank: loss_of(y[::2, :, 1:], rank),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_non_contiguous_inputs_and_gradients_are_right(name: str, gradient: str) -> None:
    operator, loss = OPERATORS[name], GRADIENTS[gradient]
    for n, dim in ((2, 0), (3, 1)):
        xs = [transposed(x) for x in given_to(operator, n, dim, (3, 6, 4), torch.float64)]
        assert not any(x.is_contiguous() for x in xs)
        got = over_ranks(operator, xs, dim, loss)
        assert_alike(got, in_one_process(operator, xs, dim, loss))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_neither_inputs_nor_gradients_are_changed(name: str, n: int) -> None:
    operator = OPERATORS[name]
    xs = given_to(operator, n, 1, SHAPE, torch.float64)

    def work(rank: Rank) -> list[tuple[Tensor, Tensor]]:
        x = xs[rank.index].detach().requires_grad_()
        kept = [(x.detach(), x.detach().clone())]
        y = operator.call(x, rank.comm, 1)
        kept.append((y.detach(), y.detach().clone()))
        grad = drawn(y.shape, 200 + own(operator, rank.index))
        kept.append((grad, grad.clone()))
        y.backward(grad, retain_graph=True)
        assert x.grad is not None
        kept.append((x.grad, x.grad.clone()))
        x.grad = None
        y.backward(grad)
        return kept

    for kept in World(n, "cpu").run(work):
        assert all(torch.equal(now, before) for now, before in kept)


@pytest.mark.parametrize("name", ["reduce_from", "all_gather", "reduce_scatter", "all_reduce", "gather_from"])
def test_a_result_of_a_collective_may_be_changed(name: str) -> None:
    """It is nobody else's, on one rank too."""
    operator = OPERATORS[name]
    for n in (1, 2):
        xs = given_to(operator, n, 1, SHAPE, torch.float64)
        before = [x.clone() for x in xs]

        def work(rank: Rank, xs: list[Tensor] = xs) -> Tensor:
            return operator.call(xs[rank.index], rank.comm, 1).zero_()

        World(n, "cpu").run(work)
        assert all(torch.equal(x, y) for x, y in zip(xs, before, strict=True))


def test_what_is_only_named_anew_is_not_copied() -> None:
    """What enters layers forward is the tensor itself; what leaves them backward is too."""

    def work(rank: Rank) -> None:
        x = drawn(SHAPE, 0).requires_grad_()
        assert operators.copy_to(x, rank.comm).data_ptr() == x.data_ptr()
        addresses: list[int] = []
        leaf = drawn(SHAPE, 0).requires_grad_()
        mine = leaf * 1
        mine.register_hook(lambda grad: addresses.append(grad.data_ptr()))
        y, grad = operators.reduce_from(mine, rank.comm), drawn(SHAPE, 1)
        y.backward(grad)
        assert addresses == [grad.data_ptr()]

    World(2, "cpu").run(work)


@pytest.mark.parametrize("name", HAVE_A_DIM)
def test_chunks_and_what_is_joined_are_contiguous(name: str) -> None:
    """Forward and backward: what works on them next need not copy them."""
    operator = OPERATORS[name]
    xs = given_to(operator, 2, 1, (3, 4, 2), torch.float64)
    got = over_ranks(operator, xs, 1)
    assert all(t.is_contiguous() for t in (*got.outputs, *got.gradients))


def test_reduce_from_in_place_gives_its_own_input() -> None:
    """No memory is allocated, and autograd knows that the tensor is now the sum."""

    def work(rank: Rank) -> tuple[bool, Tensor, Tensor | None]:
        x = drawn(SHAPE, rank.index).requires_grad_()
        y = x.exp()  # whose backward needs what it gave: y must not be the tensor that is changed
        mine = y * 2
        z = operators.reduce_from_(mine, rank.comm)
        loss_of(z, 0).backward()
        return z is mine and z.data_ptr() == mine.data_ptr(), z.detach(), x.grad

    leaves = [drawn(SHAPE, r).requires_grad_() for r in range(3)]
    whole = total([x.exp() * 2 for x in leaves])
    loss_of(whole, 0).backward()
    for (is_same, z, grad), leaf in zip(World(3, "cpu").run(work), leaves, strict=True):
        assert is_same
        torch.testing.assert_close((z, grad), (whole.detach(), leaf.grad), rtol=0, atol=1e-12)


def test_reduce_from_in_place_of_what_backward_needs_is_an_error_and_not_a_wrong_gradient() -> None:
    def work(rank: Rank) -> None:
        x = torch.ones(3, requires_grad=True)
        operators.reduce_from_(x.exp(), rank.comm).sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        World(2, "cpu").run(work)


def test_reduce_from_in_place_of_a_parameter_is_refused() -> None:
    """Autograd does not see the change, and would not refuse it."""

    def work(rank: Rank) -> Tensor:
        weight = torch.ones(3, requires_grad=True)
        with pytest.raises(MplabError, match="take reduce_from,"):
            operators.reduce_from_(weight, rank.comm)
        with torch.no_grad():  # there it is a tensor as any other
            return operators.reduce_from_(weight, rank.comm).detach()

    assert all(torch.equal(x, torch.full((3,), 2.0)) for x in World(2, "cpu").run(work))


@pytest.mark.parametrize("name", [name for name in OPERATORS if OPERATORS[name].backward])
def test_the_gradient_of_a_gradient_is_refused_and_not_wrong(name: str) -> None:
    """Nobody would add it up over the ranks."""

    def work(rank: Rank) -> None:
        x = drawn((2, 4, 2), 0).requires_grad_()
        loss = (OPERATORS[name].call(x, rank.comm, 1) ** 3).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    World(2, "cpu").run(work)


# --- used more than once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_a_tensor_used_twice(name: str) -> None:
    """Before the operator: two calls; after it: two uses of what it gave."""
    operator = OPERATORS[name]
    xs = given_to(operator, 3, 1, SHAPE, torch.float64)

    def twice(y: Tensor, rank: int) -> Tensor:
        return loss_of(y, rank) + loss_of(y * y, rank + 10)

    def work(rank: Rank) -> tuple[Tensor, Tensor | None]:
        x = xs[rank.index].detach().requires_grad_()
        mine = own(operator, rank.index)
        first, second = (operator.call(x, rank.comm, 1) for _ in range(2))
        (twice(first, mine) + twice(second, mine)).backward()
        return second.detach(), x.grad

    outputs, gradients = zip(*World(3, "cpu").run(work), strict=True)
    want = in_one_process(operator, xs, 1, twice, num_calls=2)
    assert_alike(Seen(list(outputs), list(gradients)), want)


@pytest.mark.parametrize("name", OPERATORS)
def test_backward_twice_through_one_graph_gives_the_same(name: str) -> None:
    operator = OPERATORS[name]
    xs = given_to(operator, 2, 1, SHAPE, torch.float64)

    def work(rank: Rank) -> list[Tensor]:
        x = xs[rank.index].detach().requires_grad_()
        loss = loss_of(operator.call(x, rank.comm, 1), own(operator, rank.index))
        return [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]

    want = in_one_process(operator, xs, 1).gradients
    for (first, second), grad in zip(World(2, "cpu").run(work), want, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, grad, rtol=0, atol=1e-12)


Step = Callable[[Tensor, Rank], Tensor]
# Each pair, with work of each rank's own between the two: input, what the two are, the same by one process.
STACKED: dict[str, tuple[str, Step, Callable[[Tensor, int], Tensor]]] = {
    "copy_to, reduce_from": (
        "whole",
        lambda x, rank: operators.reduce_from(mixed(operators.copy_to(x, rank.comm), rank.index), rank.comm),
        lambda x, n: total([mixed(x, r) for r in range(n)]),
    ),
    "scatter_to, gather_from": (
        "whole",
        lambda x, rank: operators.gather_from(mixed(operators.scatter_to(x, rank.comm, 1), 0), rank.comm, 1),
        lambda x, n: mixed(x, 0),
    ),
    "all_gather, reduce_scatter": (
        "chunk",
        lambda x, rank: operators.reduce_scatter(mixed(operators.all_gather(x, rank.comm), rank.index), rank.comm),
        lambda x, n: total([mixed(x, r) for r in range(n)]),
    ),
    "reduce_scatter, all_gather": (
        "own",
        lambda x, rank: operators.all_gather(mixed(operators.reduce_scatter(x, rank.comm), 0), rank.comm),
        lambda x, n: mixed(x, 0),
    ),
    "all_reduce, all_reduce": (
        "own",
        lambda x, rank: operators.all_reduce(mixed(operators.all_reduce(x, rank.comm), rank.index), rank.comm),
        lambda x, n: total([mixed(x, r) for r in range(n)]),
    ),
}


def mixed(x: Tensor, rank: int) -> Tensor:
    """Along the last dim, which is not the one that is cut."""
    return torch.tanh(x @ drawn((x.shape[-1], x.shape[-1]), 300 + rank).to(x.dtype))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("pair", STACKED)
def test_two_operators_stacked(pair: str, n: int) -> None:
    kind, step, by_one = STACKED[pair]
    leaf = drawn(SHAPE, 0).requires_grad_()
    parts = [leaf] * n if kind == "whole" else list(leaf.tensor_split(n, 1))
    if kind == "own":
        parts = [leaf * (r + 1) for r in range(n)]  # each rank's summand
    whole = by_one(leaf if kind != "own" else total(parts), n)
    alike = pair.endswith("_from")
    if alike:
        losses = loss_of(whole, 0)
    elif pair.endswith("reduce_scatter"):
        losses = total([loss_of(y, r) for r, y in enumerate(whole.tensor_split(n, 1))])
    else:
        losses = total([loss_of(whole, r) for r in range(n)])
    grads = torch.autograd.grad(losses, parts if kind == "own" else [leaf])
    want = list(grads) if kind == "own" else list(grads * n) if kind == "whole" else grads[0].tensor_split(n, 1)
    given_parts = [part.detach().clone() for part in parts]

    def work(rank: Rank) -> Tensor | None:
        x = given_parts[rank.index].requires_grad_()
        loss_of(step(x, rank), 0 if alike else rank.index).backward()
        return x.grad

    for got, theirs in zip(World(n, "cpu").run(work), want, strict=True):
        torch.testing.assert_close(got, theirs, rtol=0, atol=1e-12)


# --- without gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_without_gradients_there_is_no_graph_and_no_message_of_backward(name: str) -> None:
    operator = OPERATORS[name]
    xs = given_to(operator, 3, 1, SHAPE, torch.float64)
    want = in_one_process(operator, xs, 1).outputs
    world = World(3, "cpu")

    def work(rank: Rank) -> list[Tensor]:
        x = xs[rank.index].detach()
        outputs = [operator.call(x, rank.comm, 1)]
        with torch.no_grad():
            outputs.append(operator.call(x.clone().requires_grad_(), rank.comm, 1))
        with torch.inference_mode():
            outputs.append(operator.call(x, rank.comm, 1))
        return outputs

    for outputs, theirs in zip(world.run(work), want, strict=True):
        assert all(y.grad_fn is None for y in outputs)
        assert all(torch.equal(y, theirs) for y in outputs)
    for ledger in world.ledgers:
        assert [m.op for m in ledger.messages] == [operator.forward] * 3 * (operator.forward is not None)


def test_only_the_gradients_that_are_asked_for_are_sent() -> None:
    """A rank whose input needs none has no backward: all ranks must agree on that, and here none needs it."""
    world = World(2, "cpu")

    def work(rank: Rank) -> Tensor | None:
        weight = torch.ones(5, requires_grad=True)
        (operators.copy_to(torch.ones(5), rank.comm) * weight).sum().backward()
        return weight.grad

    assert all(grad is not None and bool((grad == 1).all()) for grad in world.run(work))
    assert not any(ledger.messages for ledger in world.ledgers)


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_message_and_its_bytes(name: str, dtype: torch.dtype, n: int) -> None:
    """Forward and backward, of chunks that differ in length."""
    operator, dim = OPERATORS[name], 1
    xs = given_to(operator, n, dim, SHAPE, dtype)
    world = World(n, "cpu")

    def work(rank: Rank) -> int:
        x = xs[rank.index].detach().requires_grad_()
        y = operator.call(x, rank.comm, dim)
        num_forward = len(rank.comm.ledger.messages)
        loss_of(y, own(operator, rank.index)).backward()
        return num_forward

    num_elements = {"all_reduce": torch.empty(SHAPE).flatten(), "all_reduce_": torch.empty(SHAPE).flatten()}
    for rank, num_forward in enumerate(world.run(work)):
        messages = world.ledgers[rank].messages
        for op, found in ((operator.forward, messages[:num_forward]), (operator.backward, messages[num_forward:])):
            assert [m.op for m in found] == [op] * (op is not None)
            if op is None:
                continue
            cut = num_elements.get(op, torch.empty(SHAPE)).tensor_split(n, 0 if op in num_elements else dim)
            blocks = [part.numel() * dtype.itemsize for part in cut]
            want = direct_traffic(op, rank, blocks)
            assert [(m.num_messages, m.sent_bytes, m.received_bytes) for m in found] == [
                (want.num_sent, want.sent_bytes, want.received_bytes)
            ]


def test_ranks_of_a_group_talk_among_themselves() -> None:
    """On a communicator of half of the ranks."""
    world = World(4, "cpu")

    def work(rank: Rank) -> tuple[Tensor, Any]:
        half = rank.comm.group([r for r in range(4) if r % 2 == rank.index % 2])
        x = torch.full((2,), float(rank.index), requires_grad=True)
        y = operators.all_reduce(x, half)
        (y.sum() * (1 + rank.index)).backward()
        return y.detach(), x.grad

    for index, (y, grad) in enumerate(world.run(work)):
        assert y.tolist() == [2.0 + 2 * (index % 2)] * 2  # 0 + 2, or 1 + 3
        assert grad.tolist() == [4.0 + 2 * (index % 2)] * 2
    assert all(m.group == (r % 2, r % 2 + 2) for r, ledger in enumerate(world.ledgers) for m in ledger.messages)


def test_an_empty_product_is_no_expanded_tensor() -> None:
    """A product of (2, 0) and nothing has stride 0 where it has 2 rows, and no element that two could share."""
    empty = torch.empty(0, 1).expand(2, 0, 1)
    assert 0 in empty.stride()
    assert World(2, "cpu").run(lambda rank: rank.comm.all_reduce_(empty).shape) == [(2, 0, 1)] * 2
