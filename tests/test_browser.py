"""The labs as a learner has them: in JupyterLab, in a browser, with the keyboard and the mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import ROOT, jupyterlab, voila

if TYPE_CHECKING:
    from browser import Jupyter, Lab
    from playwright.sync_api import Locator

pytestmark = pytest.mark.browser
LABS = ROOT / "labs"


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    with jupyterlab(tmp_path_factory.mktemp("labs")) as running:
        yield running


def a_lab(name: str) -> Path:
    path = LABS / name
    if not path.exists():
        pytest.skip(f"labs/{name} is not there")
    return path


def a_notebook(folder: Path, *sources: str) -> Path:
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=list(map(new_code_cell, sources)), metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "written_by_the_test.ipynb")
    return folder / "written_by_the_test.ipynb"


def assert_ran_cleanly(lab: Lab) -> None:
    assert lab.errors() == []
    assert lab.not_executed() == []
    assert lab.page_errors == []
    assert lab.outside_requests == [], "a lab works without the internet"


def test_start_here_runs(jupyter: Jupyter, tmp_path: Path) -> None:
    with jupyter.open(a_lab("00_start_here.ipynb"), tmp_path / "page.png") as lab:
        lab.run_all()
        assert_ran_cleanly(lab)


def test_collectives_run_and_answer_keyboard_and_mouse(jupyter: Jupyter, tmp_path: Path) -> None:
    with jupyter.open(a_lab("01_collectives.ipynb"), tmp_path / "page.png") as lab:
        lab.run_all()
        assert_ran_cleanly(lab)

        cell = lab.show_widget("[role=slider]")
        figure, slider = cell.locator(".js-plotly-plot").first, cell.get_by_role("slider").first
        figure.locator(".main-svg").first.wait_for()
        drawn, value = figure.inner_html(), slider.get_attribute("aria-valuenow")
        slider.press("ArrowRight")
        lab.wait_until(lambda: figure.inner_html() != drawn, "the figure changes with the slider")
        assert slider.get_attribute("aria-valuenow") != value

        lab.wait_until_idle()
        shown = cell.inner_text()
        cell.get_by_role("button", name=re.compile(r"\brun\b", re.IGNORECASE)).first.click()
        lab.wait_until(lambda: cell.inner_text() != shown, "the button shows the result of its run")
        lab.wait_until_idle()
        assert "Traceback" not in cell.inner_text()
        assert_ran_cleanly(lab)


SPLIT_EXPLORER = """\
import torch
from mplab import World
from mplab.models import GPT, GPTConfig
from mplab.show import SplitExplorer
tokens = torch.randint(256, (8, 33), generator=torch.Generator().manual_seed(0))
model = GPT(GPTConfig(num_layers=4, width=128))
SplitExplorer(model, World(2, device="cpu"), (tokens[:, :-1], tokens[:, 1:]), cuts=(3,), num_microbatches=4)"""


def test_split_points_move_by_keyboard_and_the_training_really_runs(jupyter: Jupyter, tmp_path: Path) -> None:
    with jupyter.open(a_notebook(tmp_path, SPLIT_EXPLORER), tmp_path / "page.png") as lab:
        lab.run_all()
        cell = lab.show_widget("[role=slider]")
        timelines, losses = (cell.locator(".js-plotly-plot").nth(i) for i in (0, 1))
        for figure in (timelines, losses):
            figure.locator(".main-svg").first.wait_for()
            lab.wait_until(lambda f=figure: f.bounding_box()["width"] > 800, "a figure is as wide as the page")
        handle, run = cell.get_by_role("slider", name="cut"), cell.get_by_role("button", name="Run")
        assert handle.get_attribute("aria-valuetext") == "before blocks.2"
        predicted, words = timelines.inner_html(), cell.get_by_role("status").first.inner_text()

        handle.press("ArrowLeft")
        lab.wait_until(lambda: timelines.inner_html() != predicted, "the prediction changes with the handle")
        assert handle.get_attribute("aria-valuetext") == "before blocks.1"
        lab.wait_until(lambda: cell.get_by_role("status").first.inner_text() != words, "so do the words")
        assert "rank 0 is embedding to blocks.0" in cell.inner_text()

        predicted, curve = timelines.inner_html(), losses.inner_html()
        run.click()
        lab.wait_until(lambda: "4 steps really ran. The pipeline was built" in cell.inner_text(), "the run is shown")
        lab.wait_until(lambda: losses.inner_html() != curve, "the losses are drawn")
        lab.wait_until(lambda: "compute: forward" in timelines.inner_html(), "what was measured is drawn")
        assert "predicted" in timelines.locator(".legend").inner_html()
        assert_rank_0_is_on_top(timelines)

        handle.press("ArrowRight")
        lab.wait_until(lambda: "compute: forward" not in timelines.inner_html(), "a new cut is not measured yet")
        curve = losses.inner_html()
        run.press("Enter")
        lab.wait_until(lambda: "Layers moved to other ranks" in cell.inner_text(), "the layers moved")
        lab.wait_until(lambda: losses.inner_html() != curve, "the losses go on")
        assert_rank_0_is_on_top(timelines)

        cell.get_by_role("combobox").select_option("Interleaved")
        lab.wait_until(lambda: cell.get_by_role("slider", name="cut").count() == 3, "two stages a rank: three handles")
        cell.get_by_role("slider", name="cut 1 of 3").press("Home")
        lab.wait_until(
            lambda: "stage 0 on rank 0 is embedding," in cell.inner_text(), "the first handle goes to its end"
        )
        cell.get_by_role("slider", name="cut 1 of 3").press("End")
        middle = cell.get_by_role("slider", name="cut 2 of 3").get_attribute("aria-valuenow")
        lab.wait_until(
            lambda: (
                int(cell.get_by_role("slider", name="cut 1 of 3").get_attribute("aria-valuenow")) == int(middle) - 1
            ),
            "a handle stops at the next",
        )
        lab.wait_until_idle()
        assert "Traceback" not in cell.inner_text()
        assert_ran_cleanly(lab)


def assert_rank_0_is_on_top(figure: Locator) -> None:
    places = {text.text_content(): text.bounding_box()["y"] for text in figure.locator(".ytick text").all()}
    assert sorted(places, key=places.__getitem__) == ["rank 0", "rank 1"]


def test_split_points_work_under_voila(jupyter: Jupyter, tmp_path: Path) -> None:
    pytest.importorskip("voila", reason="needs Voila: pip install voila")
    with voila(jupyter.browser, a_notebook(tmp_path, SPLIT_EXPLORER)) as page:
        page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
        assert "not measured yet" in page.locator(".js-plotly-plot").first.inner_html()
        page.get_by_role("slider", name="cut").press("ArrowLeft")
        page.get_by_text("rank 0 is embedding to blocks.0").wait_for()
        page.get_by_role("button", name="Run").click()
        page.get_by_text("4 steps really ran.").wait_for(timeout=60_000)
        page.locator(".gtitle", has_text="Last step: predicted").wait_for()
        page.locator(".gtitle", has_text="before each step").wait_for()


def test_interrupt_kernel_stops_the_ranks_and_the_next_cell_works(jupyter: Jupyter, tmp_path: Path) -> None:
    notebook = a_notebook(
        tmp_path,
        "import threading\nfrom mplab import World\nnum_threads = threading.active_count()\n"
        "def for_ever(rank):\n    while True:\n        rank.comm.barrier()\n",
        "print('ranks start', flush=True)\nWorld(4).run(for_ever)",
        "print(World(4).run(lambda rank: rank.index), threading.active_count() - num_threads)",
    )
    with jupyter.open(notebook) as lab:
        lab.choose("Run", "Run All Cells")
        lab.wait_until(lambda: "ranks start" in str(lab.cells()[1]["outputs"]), "the second cell runs")
        lab.choose("Kernel", "Interrupt Kernel")
        lab.wait_until_idle()
        (error,) = lab.errors()
        assert "KeyboardInterrupt" in error

        lab.run_cell(2)
        lab.wait_until(lambda: lab.cells()[2]["outputs"] != [], "the third cell runs")
        assert "[0, 1, 2, 3] 0\n" in str(lab.cells()[2]["outputs"][0]["text"])


def test_these_tests_see_an_error_and_what_it_kept_from_running(jupyter: Jupyter, tmp_path: Path) -> None:
    with jupyter.open(a_notebook(tmp_path, "1 + 1", "1 / 0", "2 + 2")) as lab:
        lab.run_all()
        assert [error.splitlines()[-1] for error in lab.errors()] == ["ZeroDivisionError: division by zero"]
        assert lab.not_executed() == ["2 + 2"]
        lab.page.evaluate("() => fetch('http://example.invalid/figure.js').catch(() => null)")
        assert lab.outside_requests == ["http://example.invalid/figure.js"]
