"""A widget: the layers of a model as a bar, drawn to scale, and a handle on every cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mplab.show.parts import ipywidgets_module

_MIN_SHARE = 0.03  # of the bar: a layer that takes no time can still be seen, and cut off


@cache
def cut_bar_class() -> Any:
    """The widget's class, made when ipywidgets and anywidget are first needed.

    Its traits: `names` of the layers, `hints` about them, their `shares` of the bar's width; `cuts`, which handles and
    Python both move; `ranks` of the stages, and `labels`, for each stage several texts of which the longest that fits
    is shown.

    Raises:
        MplabError: they are not installed.
    """
    ipywidgets_module()
    import anywidget
    from traitlets import Float, Int, List, Unicode

    class CutBar(anywidget.AnyWidget):
        """One slider for each cut, on one rail."""

        _esm = Path(__file__).with_name("cut_bar.js").read_text("utf-8")
        _css = Path(__file__).with_name("cut_bar.css").read_text("utf-8")
        names = List(Unicode()).tag(sync=True)
        hints = List(Unicode()).tag(sync=True)
        shares = List(Float()).tag(sync=True)
        cuts = List(Int()).tag(sync=True)
        ranks = List(Int()).tag(sync=True)
        labels = List(List(Unicode())).tag(sync=True)

    return CutBar


def shares(times_s: Sequence[float]) -> list[float]:
    """Each layer's share of the bar: of the time, but wide enough to be taken hold of; they add up to 1."""
    total, floor = sum(times_s), min(_MIN_SHARE, 0.5 / len(times_s))
    if not total:
        return [1 / len(times_s)] * len(times_s)
    widths = [max(floor, time / total) for time in times_s]
    return [width / sum(widths) for width in widths]
