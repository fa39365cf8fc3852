"""The explorer of buckets as a learner has it: in JupyterLab, in a browser, with the keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from test_browser import a_notebook, assert_ran_cleanly, assert_rank_0_is_on_top
from test_browser import jupyter as jupyter

if TYPE_CHECKING:
    from browser import Jupyter

pytestmark = pytest.mark.browser

BUCKET_EXPLORER = """\
import torch
from mplab import Link, World
from mplab.models import GPT, GPTConfig
from mplab.show import BucketExplorer
tokens = torch.randint(256, (8, 33), generator=torch.Generator().manual_seed(0))
model, world = GPT(GPTConfig(num_layers=2, width=64)), World(2, device="cpu", link=Link(1e-3, 1e8))
BucketExplorer(model, world, (tokens[:, :-1], tokens[:, 1:]), bucket_bytes=1 << 16)"""


def test_buckets_move_by_keyboard_and_the_training_really_runs(jupyter: Jupyter, tmp_path: Path) -> None:
    with jupyter.open(a_notebook(tmp_path, BUCKET_EXPLORER), tmp_path / "page.png") as lab:
        lab.page.set_viewport_size({"width": 1100, "height": 1000})
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
            "bucket",
            "latency α",
            "bandwidth 1/β",
        ]
        for index, (key, said) in enumerate(
            [("ArrowRight", "128 KiB"), ("ArrowLeft", "500 µs"), ("ArrowRight", "200 MB/s")]
        ):
            predicted, words = figure.inner_html(), cell.get_by_role("status").first.inner_text()
            sliders.nth(index).get_by_role("slider").press(key)
            lab.wait_until(lambda p=predicted: figure.inner_html() != p, "the prediction changes with the slider")
            lab.wait_until(lambda w=words: cell.get_by_role("status").first.inner_text() != w, "so do the words")
            assert said in sliders.nth(index).inner_text()
        assert "over an emulated link of 500 µs and 200 MB/s; with overlap" in cell.inner_text()

        cell.get_by_role("button", name="Run").press("Enter")
        lab.wait_until(lambda: "5 steps really ran" in cell.inner_text(), "the run is shown")
        lab.wait_until(lambda: "compute: backward" in figure.inner_html(), "what was measured is drawn")
        assert {"predicted message", "message", "wait"} <= set(figure.locator(".legendtext").all_text_contents())
        assert_rank_0_is_on_top(figure)

        cell.get_by_role("checkbox").press("Space")
        lab.wait_until(lambda: "compute: backward" not in figure.inner_html(), "without overlap is not measured yet")
        lab.wait_until(lambda: "200 MB/s; without overlap" in cell.inner_text(), "the words say so")
        assert "really ran" not in cell.inner_text()
        lab.wait_until_idle()
        assert "Traceback" not in cell.inner_text()
        assert_ran_cleanly(lab)
