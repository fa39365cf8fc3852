"""In which order things happen where a gradient is sent while those of the weights are computed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from whole_layers import KINDS, NUM_IN, drawn, of_one_entry, seeded, three

from mplab import World
from mplab.comm import Communicator, Handle
from mplab.parallel.cut import TensorAxis
from mplab.parallel.tensor_layers import Entry
from mplab.world import Rank


class Watched:
    """A rank's communicator that writes down what it starts and when it is waited for."""

    def __init__(self, comm: Communicator, events: list[str]) -> None:
        self._comm, self._events = comm, events

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if name in ("all_reduce", "reduce_scatter"):
            return lambda *args, **options: (self._events.append(name), found(*args, **options))[1]
        if name not in ("iall_reduce", "ireduce_scatter"):
            return found

        def start(*args: Any, **options: Any) -> Handle[Tensor]:
            self._events.append(f"start {name}")
            handle = found(*args, **options)

            def finish() -> Tensor:
                self._events.append("wait")
                return handle.wait()

            return Handle(finish)

        return start


class Products(TorchDispatchMode):
    """Writes down the shape of each product of matrices, those of backward too."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.events.append(f"product {tuple(result.shape)}")
        return result


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_input_is_on_its_way_before_those_of_the_weights_are_computed(
    kind: str, sequence_parallel: bool
) -> None:
    """And it is waited for when they are there. Weights (6, 12), (12, 12) and (6, 12), an input (8, 12)."""
    x = drawn((2, 4, NUM_IN))
    whole = [seeded(KINDS[kind], NUM_IN, size) for size in (12, 24, 12)]

    def work(rank: Rank) -> list[str]:
        events: list[str] = []
        entry = Entry(TensorAxis(Watched(rank.comm, events)), sequence_parallel, overlap=True)  # type: ignore[arg-type]
        layers = three(entry, whole)
        for number, layer in enumerate(layers):
            layer.weight.register_hook(lambda grad, number=number: events.append(f"weight {number}"))
        mine = (x.chunk(2, 1)[rank.index] if sequence_parallel else x).clone().requires_grad_()
        mine.register_hook(lambda grad: events.append("input"))
        entered = entry(mine)
        loss = torch.stack([layer(entered).sin().sum() for layer in layers]).sum()
        for _ in range(2):
            events.append("backward")
            with Products(events):
                loss.backward(retain_graph=True)
        return events

    for events in World(2, "cpu").run(work):
        first, second = " | ".join(events).split("backward | ")[1:]
        assert first == f"{second} | "
        steps = second.split(" | ")
        start, wait = (
            steps.index(f"start {'ireduce_scatter' if sequence_parallel else 'iall_reduce'}"),
            steps.index("wait"),
        )
        assert steps[:start] == ["product (8, 12)"] * 3
        sizes = [(12, size) if kind == "Conv1D" else (size, 12) for size in (6, 12, 6)]
        between = [[f"product {size}", f"weight {number}"] for number, size in enumerate(sizes)]
        assert sorted(steps[start + 1 : wait]) == sorted(itertools.chain(*between))
        assert steps[wait:] == ["wait", "input"]


def test_without_overlap_nothing_is_started() -> None:
    def work(rank: Rank) -> list[str]:
        events: list[str] = []
        entry = Entry(TensorAxis(Watched(rank.comm, events)))  # type: ignore[arg-type]
        layers = three(entry, of_one_entry())
        entered = entry(drawn((2, 4, NUM_IN)).requires_grad_())
        torch.stack([layer(entered).sin().sum() for layer in layers]).sum().backward()
        return events

    assert World(2, "cpu").run(work) == [["all_reduce"]] * 2
