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
    # A second thread of torch would wait for work in a loop, on a core that a rank or another worker needs.
    with jupyterlab(tmp_path_factory.mktemp("labs"), OMP_NUM_THREADS="1") as running:
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


def move_sliders(lab: Lab, moves: dict[str, tuple[str, str]]) -> tuple[Locator, Locator, Locator]:
    """Press a key on each slider of an explorer: its first figure and its words change.

    Args:
        lab: whose first widget with sliders is the explorer.
        moves: the sliders' labels, in order; for each the key, and what the slider says then.

    Returns:
        The cell, the figure and the sliders.
    """
    cell = lab.show_widget("[role=slider]")
    figure, sliders, words = (
        cell.locator(".js-plotly-plot").first,
        cell.locator(".widget-slider"),
        cell.get_by_role("status"),
    )
    drawing, box = figure.locator(".main-svg").first, cell.locator(".widget-vbox").first
    drawing.wait_for()
    lab.wait_until(
        lambda: drawing.bounding_box()["width"] <= box.bounding_box()["width"], "the figure is no wider than the page"
    )
    assert sliders.locator("label").all_inner_texts() == list(moves)
    for index, (key, says) in enumerate(moves.values()):
        drawn, said = figure.inner_html(), words.first.inner_text()
        sliders.nth(index).get_by_role("slider").press(key)
        lab.wait_until(lambda d=drawn: figure.inner_html() != d, "the figure changes with the slider")
        lab.wait_until(lambda s=said: words.first.inner_text() != s, "so do the words")
        assert says in sliders.nth(index).inner_text()
    return cell, figure, sliders


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
        moves = {
            "bucket": ("ArrowRight", "128 KiB"),
            "latency α": ("ArrowLeft", "500 µs"),
            "bandwidth 1/β": ("ArrowRight", "200 MB/s"),
        }
        cell, figure, _ = move_sliders(lab, moves)
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


TENSOR_EXPLORER = """\
from mplab import Link
from mplab.show import TensorExplorer
TensorExplorer(flops_s=5e10, link=Link(2e-5, 1e10), width=256, sequence=64, emulated=Link(1e-3, 1e8))"""


def test_sliders_move_by_keyboard_and_the_block_really_runs(jupyter: Jupyter, tmp_path: Path) -> None:
    with jupyter.open(a_notebook(tmp_path, TENSOR_EXPLORER), tmp_path / "page.png") as lab:
        lab.page.set_viewport_size({"width": 1100, "height": 1200})
        lab.run_all()
        moves = {
            "width": ("ArrowRight", "384"),
            "ranks": ("ArrowRight", "4"),
            "sequence": ("ArrowLeft", "32"),
            "link": ("ArrowLeft", "500 µs, 200 MB/s"),
        }
        cell, figure, sliders = move_sliders(lab, moves)
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
        lab.wait_until(lambda: "a rank: fits" in bars.inner_html(), "the bars are drawn")
        lab.wait_until(lambda: "rank 3" in timeline.inner_html(), "and the step of four ranks")

        def press(name: str, key: str) -> None:
            cell.get_by_role("slider", name=name).press(key)

        heard = cell.get_by_role("slider", name="tp (tensor)")
        lab.wait_until(lambda: heard.get_attribute("aria-valuetext") == "2", "what it stands on, not its place")
        title = bars.locator(".gtitle").text_content()
        lab.wait_until(lambda: cell.get_by_role("img", name=title).count() == 1, "the figure has its title as a name")

        press("pp (pipeline)", "ArrowRight")
        lab.wait_until(lambda: "2 x 2 x 2 = 8 ranks, and there are up to 4 here" in cell.inner_text(), "a refusal")
        assert "Drawn is still: 2 x 1 x 2 ranks" in cell.get_by_role("status").first.inner_text()
        assert cell.get_by_role("button", name="Run it").is_disabled()
        assert "a rank: fits" in bars.inner_html(), "the figure stays"

        drawn = timeline.inner_html()
        press("tp (tensor)", "ArrowLeft")
        lab.wait_until(lambda: "2 x 2 x 1 ranks (dp x pp x tp), 1f1b" in cell.inner_text(), "a plan that can be")
        lab.wait_until(lambda: timeline.inner_html() != drawn, "the step is drawn anew")
        press("micro-batches", "ArrowRight")
        lab.wait_until(lambda: "2 micro-batches" in cell.inner_text(), "micro-batches")
        assert cell.get_by_role("slider", name="micro-batches").get_attribute("aria-valuetext") == "2"
        title = bars.locator(".gtitle").text_content()
        lab.wait_until(lambda: cell.get_by_role("img", name=title).count() == 1, "the name of the figure, too")

        handle = cell.locator(".mplab-cuts .handle")
        assert handle.get_attribute("aria-valuetext") == "before blocks.1"
        handle.press("ArrowLeft")
        lab.wait_until(lambda: "cut at [1]" in cell.inner_text(), "the cut moves by keyboard")
        lab.wait_until(lambda: "Stages: embedding, blocks.0 to head" in cell.inner_text(), "the words say so")

        cell.get_by_role("button", name="Run it").press("Enter")
        lab.wait_until(lambda: "3 steps really ran, the first to warm up" in cell.inner_text(), "the run is told")
        lab.wait_until(lambda: "Median step: predicted" in timeline.inner_html(), "what was measured is drawn")
        lab.wait_until(lambda: "not measured yet" not in bars.inner_html(), "in the bars too")
        run = cell.get_by_role("button", name="Run it")
        lab.wait_until(lambda: run.evaluate("button => button === document.activeElement"), "the focus is back")

        cell.locator(".widget-dropdown", has_text="machine").locator("select").press("End")
        lab.wait_until(lambda: "64 x 8 H100 is described by its figures" in cell.inner_text(), "why it can't run")
        assert cell.get_by_role("button", name="Run it").is_disabled()
        assert "really ran" not in cell.inner_text()
        lab.wait_until_idle()
        assert "Traceback" not in cell.inner_text()
        assert_ran_cleanly(lab)


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
