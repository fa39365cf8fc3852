"""Figures as headless Chromium draws them, in one page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
