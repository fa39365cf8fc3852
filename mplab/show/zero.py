"""Memory of a rank under the stages of ZeRO, as bars: what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mplab.errors import MplabError
from mplab.plan.zero import Memory
from mplab.show.figures import BAR_TEXT, FITTING_TEXT, MEMORY_LOOKS, BarLook, graph_objects, lay_out
from mplab.trace.units import columns

_MIB = 1 << 20
_WIDTH, _APART = 0.38, 0.41  # of a bar, and of the middles of two, in stages
_PLOT_PX = 330
_ROOM = 1.1  # of the axis, for the sums on top of the bars


_ALL_TOGETHER = BarLook("#B0B0B0", "#EDEDED", "black", "-")


def zero_memory_figure(
    predicted: Mapping[int, Memory],
    measured: Mapping[int, Memory | int] | None = None,
    notes: Sequence[str] = (),
    title: str = "Memory of a rank under ZeRO",
) -> Any:
    """Bars for every stage, one part on the other: predicted pale, and beside them measured filled.

    Args:
        predicted: of a rank, by stage, 0 to 3.
        measured: the same; bytes alone where the parts are not known. Not every stage needs to be there.
        notes: what the bars cannot prove, such as `world.notes`.
        title: above the figure.

    Raises:
        MplabError: plotly is not installed; nothing is predicted, or something is measured that is not.
    """
    measured = _check(predicted, measured)
    go = graph_objects()
    figure, apart = go.Figure(), _APART / 2 if measured else 0.0
    kinds = {"predicted": (predicted, -apart), "measured": (measured, apart)}
    highest = max(_total(memory) for memories, _ in kinds.values() for memory in memories.values())
    for kind, (memories, aside) in kinds.items():
        for name, look in {**MEMORY_LOOKS, "all together": _ALL_TOGETHER}.items():
            sizes = {stage: _parts(memory)[name] for stage, memory in memories.items() if name in _parts(memory)}
            if not any(sizes.values()):
                continue
            in_legend = name if name in MEMORY_LOOKS else f"{kind}, {name}"
            figure.add_bar(
                name=in_legend,
                legendgroup=in_legend,
                showlegend=in_legend not in [bars.name for bars in figure.data],
                x=[stage + aside for stage in sizes],
                y=[size / _MIB for size in sizes.values()],
                width=_WIDTH,
                text=[_mib(size) if size and name in MEMORY_LOOKS else "" for size in sizes.values()],
                **BAR_TEXT,
                textfont={"size": 11, "color": "black" if kind == "predicted" else look.text},
                hovertext=[f"ZeRO {stage}, {name}, {kind}: {size:,} bytes" for stage, size in sizes.items()],
                hoverinfo="text",
                marker={
                    "color": look.pale if kind == "predicted" else look.fill,
                    "line": {"color": "black", "width": 1.2 if kind == "predicted" else 0.6},
                    "pattern": {"shape": look.hatching, "fgcolor": "#444444", "size": 7, "solidity": 0.12},
                },
            )
        figure.add_scatter(
            x=[stage + aside for stage in memories],
            y=[_total(memory) / _MIB for memory in memories.values()],
            text=[f"<b>{_mib(_total(memory))}</b>" for memory in memories.values()],
            mode="text",
            textposition="top center",
            textfont={"size": 12},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.update_layout(
        barmode="stack",
        uniformtext=FITTING_TEXT,
        bargap=0,
        xaxis={
            "title": {"text": "stage of ZeRO; 0: all of it on every rank", "standoff": 6},
            "tickvals": list(predicted),
            "ticktext": [f"ZeRO {stage}" for stage in predicted],
            "range": [min(predicted) - 0.55, max(predicted) + 0.55],
        },
        legend={"traceorder": "normal"},
        yaxis={"title": {"text": "MiB on a rank", "standoff": 4}, "range": [0, (highest or 1) * _ROOM / _MIB]},
    )
    notes = [*(["left of each pair, pale: predicted; right, dark: measured"] if measured else []), *notes]
    return lay_out(figure, _PLOT_PX, title, notes)


def zero_memory_table(predicted: Mapping[int, Memory], measured: Mapping[int, Memory | int] | None = None) -> str:
    """The figure in words: a line for every stage and kind, in bytes.

    Args:
        predicted: of a rank, by stage, 0 to 3.
        measured: the same; bytes alone where the parts are not known.

    Raises:
        MplabError: nothing is predicted, or something is measured that is not.
    """
    measured = _check(predicted, measured)
    rows = [["stage", "", *MEMORY_LOOKS, "all together", "of stage 0"]]
    for stage, memory in predicted.items():
        for kind, of_kind in (("predicted", predicted), ("measured", measured)):
            if stage in of_kind:
                parts, first = _parts(of_kind[stage]), of_kind.get(0)
                share = f"{100 * _total(of_kind[stage]) / _total(first):.1f} %" if first and _total(first) else "-"
                cells = [f"{parts[name]:,}" if name in parts else "-" for name in MEMORY_LOOKS]
                rows.append([f"ZeRO {stage}", kind, *cells, f"{_total(of_kind[stage]):,}", share])
        if stage in measured:
            error = _total(memory) / _total(measured[stage]) - 1 if _total(measured[stage]) else 0.0
            rows[-1].append(f"predicted {abs(error):.1%} too {'little' if error < 0 else 'much'}".replace("%", " %"))
    return columns(rows, "ll" + "r" * (len(rows[0]) - 2) + "l")


def _parts(memory: Memory | int) -> dict[str, int]:
    if isinstance(memory, int):
        return {"all together": memory}
    sizes = (memory.parameters_bytes, memory.gradients_bytes, memory.optimizer_bytes, memory.activations_bytes)
    return dict(zip(MEMORY_LOOKS, sizes, strict=True))


def _total(memory: Memory | int) -> int:
    return sum(_parts(memory).values())


def _mib(size_bytes: int) -> str:
    size = size_bytes / _MIB
    return f"{size:.3g}" if size < 999.5 else f"{size:,.0f}"


def _check(predicted: Mapping[int, Memory], measured: Mapping[int, Memory | int] | None) -> Mapping[int, Memory | int]:
    measured = measured or {}
    if not predicted or not measured.keys() <= predicted.keys():
        raise MplabError(
            f"predicted are the stages {list(predicted)}, measured {list(measured)}: predict one or more, and all "
            "that are measured"
        )
    return measured
