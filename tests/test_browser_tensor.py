"""The explorer of tensor parallelism as a learner has it: in JupyterLab, in a browser, with the keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from test_browser import a_notebook, assert_ran_cleanly
from test_browser import jupyter as jupyter

if TYPE_CHECKING:
    from browser import Jupyter

pytestmark = pytest.mark.browser

TENSOR_EXPLORER = """\
from mplab import Link
from mplab.show import TensorExplorer
TensorExplorer(flops_s=5e10, link=Link(2e-5, 1e10), width=256, sequence=64, emulated=Link(1e-3, 1e8))"""


def test_sliders_move_by_keyboard_and_the_block_really_runs(jupyter: Jupyter, tmp_path: Path) -> None:
    with jupyter.open(a_notebook(tmp_path, TENSOR_EXPLORER), tmp_path / "page.png") as lab:
        lab.page.set_viewport_size({"width": 1100, "height": 1200})
        lab.run_all()
        cell = lab.show_widget("[role=slider]")
        figure = cell.locator(".js-plotly-plot").first
        figure.locator(".main-svg").first.wait_for()
        lab.wait_until(
            lambda: (
                figure.locator(".main-svg").first.bounding_box()["width"]
                <= cell.locator(".widget-vbox").first.bounding_box()["width"]
            ),
            "the figure is no wider than the page",
        )
        sliders = cell.locator(".widget-slider")
        assert [label.inner_text() for label in sliders.locator("label").all()] == [
            "width",
            "ranks",
            "sequence",
            "link",
        ]
        for index, (key, said) in enumerate(
            [("ArrowRight", "384"), ("ArrowRight", "4"), ("ArrowLeft", "32"), ("ArrowLeft", "500 µs, 200 MB/s")]
        ):
            drawn, words = figure.inner_html(), cell.get_by_role("status").first.inner_text()
            sliders.nth(index).get_by_role("slider").press(key)
            lab.wait_until(lambda d=drawn: figure.inner_html() != d, "the figure changes with the slider")
            lab.wait_until(lambda w=words: cell.get_by_role("status").first.inner_text() != w, "so do the words")
            assert said in sliders.nth(index).inner_text()
        assert "32 tokens of width 384" in cell.inner_text()
        assert "over an emulated link of 500 µs, 200 MB/s" in cell.inner_text()
        assert "not measured yet" in figure.inner_html()

        cell.get_by_role("button", name="Run it").press("Enter")
        lab.wait_until(lambda: "It really ran, 5 times each" in cell.inner_text(), "the run is shown")
        lab.wait_until(lambda: "not measured yet" not in figure.inner_html(), "what was measured is drawn")

        sliders.nth(3).get_by_role("slider").press("Home")
        lab.wait_until(lambda: "not measured yet" in figure.inner_html(), "another link is not measured yet")
        lab.wait_until(lambda: "bytes, over this machine's link" in cell.inner_text(), "the words say so")
        assert "really ran" not in cell.inner_text()
        lab.wait_until_idle()
        assert "Traceback" not in cell.inner_text()
        assert_ran_cleanly(lab)
