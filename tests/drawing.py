"""Figures as headless Chromium draws them, in one page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from browser import CHROMIUM_ARGS, find_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

DRAW = """async drawn => {
  document.body.innerHTML = "<div></div>";
  const { data, layout } = JSON.parse(drawn);
  await Plotly.newPlot(document.body.firstChild, data, layout, { responsive: true });
}"""

STACKED = ("title", "legend", "plot", "ticks", "axis", "notes")  # from top to bottom
BOXES = """() => {
  const box = (selector) => [...document.querySelectorAll(selector)].map(e => e.getBoundingClientRect())
    .filter(r => r.width > 0).map(r => [r.left, r.top, r.right, r.bottom]);
  return {title: box(".gtitle"), legend: box(".legend"), plot: box(".nsewdrag"), ticks: box(".xtick"),
    axis: box(".xtitle"), notes: box(".annotation"), ranks: box(".ytick"), labels: box(".scatterlayer text")};
}"""


@contextlib.contextmanager
def drawing_page() -> Iterator[Page]:
    """A page in a headless Chromium that has plotly.js, for `draw`: to load it takes longer than to draw."""
    import plotly
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGS)
        try:
            page = browser.new_page()
            page.add_script_tag(path=Path(plotly.__file__).parent / "package_data" / "plotly.min.js")
            yield page
        finally:
            browser.close()


def draw(page: Page, figure: Any, width_px: int) -> None:
    """Draw a figure, alone on a page of this width, which it fills where it has no width of its own."""
    page.set_viewport_size({"width": width_px, "height": figure.layout.height + 40})
    page.evaluate(DRAW, figure.to_json())


def boxes_of(page: Page, figure: Any, width_px: int) -> dict[str, list[list[float]]]:
    """Draw a figure of rows, a rank each: the left, top, right and bottom of its parts, of which none meets another.

    All are on the page: above each other from the title to the notes, and the names of ranks beside the rows.
    """
    draw(page, figure, width_px)
    boxes: dict[str, list[list[float]]] = page.evaluate(BOXES)
    stacked = [boxes[part] for part in STACKED if boxes[part]]
    for above, below in pairwise(stacked):
        assert max(box[3] for box in above) <= min(box[1] for box in below) + 1
    for parts in boxes.values():
        for left, top, right, bottom in parts:
            assert min(left, top) >= 0
            assert right <= width_px
            assert bottom <= figure.layout.height + 16  # with the margin of the page
    assert max(box[2] for box in boxes["ranks"]) <= min(box[0] for box in boxes["plot"])
    return boxes
