"""The labs as a learner has them: in JupyterLab, in a browser, with the keyboard and the mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import ROOT, jupyterlab

if TYPE_CHECKING:
    from browser import Jupyter, Lab

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
