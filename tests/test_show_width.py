"""Figures as a browser draws them, on a wide page and on a narrow one: no text is cut off, and none is over another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import pytest
from drawing import draw, drawing_page
from test_show import hops_of
from test_show_plan import CLUSTER, CORES, MEASURED, PREDICTION
from test_show_tensor import BLOCK, SPEEDS

from mplab import Link, Plan
from mplab.plan.zero import Memory
from mplab.show import all_reduce_times, link_fits, mesh_figure, plans_figure, tensor_times_figure, zero_memory_figure
from mplab.show.plan_figure import plan_figure
from mplab.show.redraw import Loss, loss_curve
from mplab.trace import Event, Timeline
from mplab.trace.compare import Comparison
from mplab.world.links import fit_link

pytestmark = pytest.mark.browser

# Those texts that are kept apart; by name, so that an axis has all of its marks.
TEXTS = {
    "title": ".gtitle",
    "legend": ".legend",
    "second legend": ".legend2",
    "notes": ".annotation:last-child .annotation-text-g",
    **{f"{axis} says": f".{axis}title" for axis in ("x", "x2")},
    **{f"{axis} mark": f".{axis}tick text" for axis in ("x", "x2", "y", "y2")},
}
BESIDE = {"y says": ".ytitle", "y2 says": ".y2title", "sum": ".textpoint text"}  # these only stay inside
BOXES = """selectors => {
  const plot = document.querySelector(".js-plotly-plot"), home = plot.getBoundingClientRect();
  const boxes = [];
  for (const [name, selector] of Object.entries(selectors))
    for (const element of plot.querySelectorAll(selector)) {
      const box = element.getBoundingClientRect();
      if (box.width) boxes.push([name, box.left - home.left, box.right - home.left, box.top - home.top,
        box.bottom - home.top]);
    }
  return boxes;
}"""


class Box(NamedTuple):
    name: str
    left: float
    right: float
    top: float
    bottom: float

    def is_over(self, other: Box) -> bool:
        across = min(self.right, other.right) - max(self.left, other.left)
        return across > 1 and min(self.bottom, other.bottom) - max(self.top, other.top) > 2


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with drawing_page() as made:
        yield made


def boxes(page: Any, figure: Any, width_px: int) -> list[Box]:
    draw(page, figure.update_layout(width=width_px), 1000)
    return [Box(*box) for box in page.evaluate(BOXES, TEXTS | BESIDE)]


def a_link(name: str, times: float) -> Any:
    return fit_link(name, [1 << 10, 1 << 14, 1 << 20], [times * s for s in (1e-5, 1.1e-5, 1e-4)])


def many_plans() -> Any:
    plans = [Plan(dp=2), Plan(tp=2), Plan(pp=2), Plan(dp=2, tp=2), Plan()]
    predictions = [replace(PREDICTION, plan=plan, compute_s=(i + 1) * 1e-2) for i, plan in enumerate(plans)]
    return plans_figure(predictions, {p.plan: [0.09 - p.compute_s] for p in predictions}, notes=["a note " * 20])


A_STEP = Timeline([Event(r, "compute", "forward", 0, 4e-3) for r in (0, 1)], 2, ("a note " * 20,))
FIGURES: dict[str, Callable[[], Any]] = {
    "plan": lambda: plan_figure(PREDICTION, CORES.with_ranks(4), MEASURED),
    "plan of a cluster": lambda: plan_figure(replace(PREDICTION, fits=False), CLUSTER, None, "can't run here"),
    "plans": many_plans,
    "mesh": lambda: mesh_figure(Plan(2, 2, 2)),
    "large mesh": lambda: mesh_figure(Plan(8, 16, 8)),
    "tensor": lambda: tensor_times_figure(BLOCK, 2, SPEEDS, Link(1e-3, 1e8)),
    "zero": lambda: zero_memory_figure(
        {s: Memory(4 << 20, 4 << 20, 8 << 20, 2 << 20) for s in range(4)}, {0: 19 << 20}, ["a note " * 20]
    ),
    "hops": lambda: hops_of(8, "ring").figure(),
    "uneven hops": lambda: hops_of(4, "halving_doubling").figure(),
    "links": lambda: link_fits([a_link("threads", 1), a_link("gloo processes", 30)], ["a note " * 20], "A " * 40),
    "all-reduces": lambda: all_reduce_times(Link(1e-3, 1e8), 4, {"ring": [(4096, 7e-3)]}, ["a note " * 20]),
    "steps": lambda: Comparison(A_STEP, A_STEP, [("computing", 1.0)], "A step of a long name").figure(),
    "parts of a step": lambda: Comparison(A_STEP, A_STEP, [("computing", 1.0)], "A step of a long name").parts_figure(),
    "losses": lambda: loss_curve([Loss(1, 5.0, "so"), Loss(1, 4.0, "so")], 2),
}


@pytest.mark.parametrize("width_px", [360, 600, 1000])
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off_or_over_another(page: Any, name: str, width_px: int) -> None:
    found = boxes(page, FIGURES[name](), width_px)
    assert {"title", "notes"} <= {box.name for box in found}
    outside = [box for box in found if box.left < -1 or box.right > width_px + 1]
    assert outside == []
    apart = [box for box in found if box.name in TEXTS]
    over = [(a, b) for a, b in combinations(apart, 2) if a.is_over(b)]
    assert over == []


def test_these_tests_see_what_is_cut_off_and_what_is_over_another(page: Any) -> None:
    figure = loss_curve([Loss(1, 5.0, "so")], 2).update_layout(title_text="far too long a title " * 5)
    figure.layout.annotations[-1].yshift = -25
    found = boxes(page, figure, 360)
    assert max(box.right for box in found if box.name == "title") > 361
    assert any(a.is_over(b) for a, b in combinations(found, 2))


def test_a_bar_has_its_length_written_in_it_only_where_there_is_room(page: Any) -> None:
    written = []
    for width_px in (360, 1000):
        boxes(page, plan_figure(PREDICTION, CORES, MEASURED), width_px)
        shown = "[...document.querySelectorAll('.bartext')].filter(text => text.getBoundingClientRect().width > 0)"
        written.append(page.evaluate(f"{shown}.length"))
    assert all(narrow < wide for narrow, wide in pairwise(written))
