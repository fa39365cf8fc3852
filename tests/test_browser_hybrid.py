"""The explorer of plans as a learner has it: in JupyterLab, in a browser, with the keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from test_browser import a_notebook, assert_ran_cleanly
from test_browser import jupyter as jupyter

if TYPE_CHECKING:
    from browser import Jupyter

pytestmark = pytest.mark.browser

PLAN_EXPLORER = """\
from mplab import Link
from mplab.models import GPTConfig
from mplab.plan.machines import Machine
from mplab.show import PlanExplorer
here = Machine("2 cores", 2, 3e10, 4e9, 1e10, Link(3e-5, 4e9), launch_s=3e-4)
PlanExplorer(GPTConfig(width=64), 8, num_steps=2, machine=here)"""


def test_plans_are_chosen_by_keyboard_and_really_run(jupyter: Jupyter, tmp_path: Path) -> None:
    with jupyter.open(a_notebook(tmp_path, PLAN_EXPLORER), tmp_path / "page.png") as lab:
        lab.page.set_viewport_size({"width": 1100, "height": 1600})
        lab.run_all()
        cell = lab.show_widget("[role=slider]")
        figures = cell.locator(".js-plotly-plot")
        bars, timeline = figures.nth(0), figures.nth(1)
        lab.wait_until(lambda: figures.count() == 2, "both figures are there")
        lab.wait_until(lambda: "on a rank: fits" in bars.inner_html(), "the bars are drawn")
        lab.wait_until(lambda: "rank 3" in timeline.inner_html(), "and the step of four ranks")

        def press(name: str, key: str) -> None:
            cell.locator(".widget-slider", has_text=name).get_by_role("slider").press(key)

        press("pp (pipeline)", "ArrowRight")
        lab.wait_until(lambda: "2 x 2 x 2 = 8 ranks, and there are up to 4 here" in cell.inner_text(), "a refusal")
        assert "Drawn is still: 2 x 1 x 2 ranks" in cell.get_by_role("status").first.inner_text()
        assert cell.get_by_role("button", name="Run it").is_disabled()
        assert "on a rank: fits" in bars.inner_html(), "the figure stays"

        drawn = timeline.inner_html()
        press("tp (tensor)", "ArrowLeft")
        lab.wait_until(lambda: "2 x 2 x 1 ranks (dp x pp x tp), 1f1b" in cell.inner_text(), "a plan that can be")
        lab.wait_until(lambda: timeline.inner_html() != drawn, "the step is drawn anew")
        press("micro-batches", "ArrowRight")
        lab.wait_until(lambda: "2 micro-batches" in cell.inner_text(), "micro-batches")

        handle = cell.locator(".mplab-cuts .handle")
        assert handle.get_attribute("aria-valuetext") == "before blocks.1"
        handle.press("ArrowLeft")
        lab.wait_until(lambda: "cut at [1]" in cell.inner_text(), "the cut moves by keyboard")
        lab.wait_until(lambda: "Stages: embedding, blocks.0 to head" in cell.inner_text(), "the words say so")

        cell.get_by_role("button", name="Run it").press("Enter")
        lab.wait_until(lambda: "3 steps really ran, the first to warm up" in cell.inner_text(), "the run is told")
        lab.wait_until(lambda: "Median step: predicted" in timeline.inner_html(), "what was measured is drawn")
        lab.wait_until(lambda: "not measured yet" not in bars.inner_html(), "in the bars too")

        cell.locator(".widget-dropdown", has_text="machine").locator("select").press("End")
        lab.wait_until(lambda: "64 x 8 H100 is described by its figures" in cell.inner_text(), "why it can't run")
        assert cell.get_by_role("button", name="Run it").is_disabled()
        assert "really ran" not in cell.inner_text()
        lab.wait_until_idle()
        assert "Traceback" not in cell.inner_text()
        assert_ran_cleanly(lab)
