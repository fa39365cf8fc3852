"""An algorithm drawn hop by hop, from the messages that a run really sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mplab.comm.hops import Hop, steps
from mplab.comm.ledger import Ledger
from mplab.errors import MplabError
from mplab.show.figures import graph_objects, lay_out

_ROW_PX = 46
_MAX_WIDTH_PX, _MANY_STEPS = (6.0, 3.5), 8  # of an arrow; from how many steps on it is narrower


class Hops:
    """Who sent how much to whom, step by step; prints as text, draws itself with `figure()`.

    Args:
        ledgers: of a run whose ranks used send and recv: `world.ledgers`.
        title: what ran.
        tensor_bytes: bytes of the whole tensor, for the widest arrow; by default those of the largest message.

    Raises:
        MplabError: nothing was sent with `send`: the direct collectives leave no hops.
    """

    def __init__(self, ledgers: Sequence[Ledger], title: str = "", tensor_bytes: int | None = None) -> None:
        self.num_ranks, self.title, self.tensor_bytes = len(ledgers), title, tensor_bytes
        self.steps: tuple[tuple[Hop, ...], ...] = tuple(map(tuple, steps(ledgers)))
        others = sorted({message.op for ledger in ledgers for message in ledger.messages} - {"send", "recv"})
        if others and not self.steps:
            raise MplabError(
                f"this run called {', '.join(others)} and sent nothing by `send`, so there are no hops to draw: "
                "take an algorithm from mplab.comm.algorithms, or one of your own"
            )

    @property
    def size_bytes(self) -> int:
        """All bytes that were sent."""
        return sum(hop.size_bytes for step in self.steps for hop in step)

    def __str__(self) -> str:
        num_messages = sum(map(len, self.steps))
        heading = f"{len(self.steps)} steps, {num_messages} messages, {self.size_bytes:,} bytes"
        return "\n".join([f"{self.title}: {heading}" if self.title else heading, *self._lines()])

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        width = len(str(len(self.steps)))
        for number, step in enumerate(self.steps, start=1):
            sizes = dict.fromkeys(hop.size_bytes for hop in step)
            told = [
                ", ".join(f"{hop.src} → {hop.dst}" for hop in step if hop.size_bytes == size) + f" ({size:,} bytes)"
                for size in sizes
            ]
            yield f"  step {number:>{width}}:  {'; '.join(told)}"

    def figure(self) -> Any:
        """A plotly figure: a row a rank, a column a step, an arrow a message, as wide as its bytes are many.

        Raises:
            MplabError: plotly is not installed.
        """
        go = graph_objects()
        num_columns = max(len(self.steps), 1)
        largest = max((hop.size_bytes for step in self.steps for hop in step), default=0)
        full_bytes = self.tensor_bytes or largest or 1
        figure, full_px = go.Figure(), _MAX_WIDTH_PX[num_columns > _MANY_STEPS]
        for rank in range(self.num_ranks):
            figure.add_scatter(
                x=[0.5, num_columns + 0.5],
                y=[rank, rank],
                mode="lines",
                line={"color": "#B0B0B0", "width": 1},
                hoverinfo="skip",
            )
        arrows = []  # set together: with each that is added alone, plotly checks all before it again
        for number, step in enumerate(self.steps, start=1):
            for hop in step:
                share = min(hop.size_bytes / full_bytes, 1.0)
                arrow = {
                    "x": number + 0.36,
                    "y": hop.dst,
                    "ax": number - 0.36,
                    "ay": hop.src,
                    "axref": "x",
                    "ayref": "y",
                    "text": "",
                    "arrowhead": 2,
                    "arrowwidth": 1.2 + (full_px - 1.2) * share,
                    "arrowsize": 1.2 if share < 0.5 else 0.7,
                    "arrowcolor": "#0072B2",
                }
                arrows.append(arrow)
        figure.add_scatter(
            x=[number - 0.36 for number, step in enumerate(self.steps, start=1) for _ in step],
            y=[hop.src for step in self.steps for hop in step],
            mode="markers",
            marker={"color": "#00304B", "size": 8},
            hovertext=[f"rank {h.src} → rank {h.dst}: {h.size_bytes:,} bytes" for step in self.steps for h in step],
            hoverinfo="text",
        )
        sizes = [self._sizes(step) for step in self.steps]
        is_alike = len(self.steps) > 1 and len(set(sizes)) == 1
        marks = [f"{n}" if is_alike else f"{n}<br>{of_step}" for n, of_step in enumerate(sizes, start=1)]
        says = f"step: {sizes[0]} bytes in each" if is_alike else "step: how many messages × bytes"
        figure.update_layout(
            annotations=arrows,
            showlegend=False,
            xaxis={
                "title": {"text": says, "standoff": 8},
                "tickangle": 0,
                "tickvals": list(range(1, len(self.steps) + 1)),
                "ticktext": marks,
                "range": [0.4, num_columns + 0.6],
                "showgrid": False,
                "zeroline": False,
            },
            yaxis={
                "tickvals": list(range(self.num_ranks)),
                "ticktext": [f"rank {rank}" for rank in range(self.num_ranks)],
                "range": [self.num_ranks - 0.6, -0.4],
                "showgrid": False,
                "zeroline": False,
            },
        )
        notes = [
            f"An arrow is a message of the run, as wide as its bytes are many: at most {full_bytes:,}.",
            "Steps, not seconds: in each a rank sends one message and receives one.",
        ]
        figure = lay_out(figure, self.num_ranks * _ROW_PX, self.title, notes)
        figure.update_layout(margin_b=figure.layout.margin.b + 16, height=figure.layout.height + 16)
        figure.layout.annotations[-1].yshift -= 16  # the marks of the steps have two lines
        return figure

    def _sizes(self, step: Sequence[Hop]) -> str:
        sizes = sorted({hop.size_bytes for hop in step})
        return f"{len(step)} × {sizes[0]:,}" + (f"–{sizes[-1]:,}" if len(sizes) > 1 else "")
