"""Take the README's pictures: a pipeline's timeline under its prediction, and the split-point widget after a run.

python tools/pictures.py

Both are opened in JupyterLab, in the Chromium that the machine has, and trained there. They hold this machine's times,
so take them where nothing else runs, look at them, and keep README's words true.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import SHOW_CELL, jupyterlab  # noqa: E402  # the browser that the tests look with

if TYPE_CHECKING:
    from browser import Lab
    from playwright.sync_api import Locator

FOLDER = ROOT / "docs" / "pictures"
PAGE = {"width": 1080, "height": 1500}  # leaves about 900 pixels for what a cell shows: as wide as README is read
MAX_BYTES = 150_000

TIMELINE = """\
from functools import partial

import torch

from mplab import World
from mplab.datasets import text
from mplab.models import GPT, GPTConfig
from mplab.parallel import Predictor
from mplab.show import SplitExplorer

batch = text(batch_size=16, sequence=64).batch(0)
sizes = {"context_length": 64, "num_heads": 4, "width": 128, "tied": False}
sgd = partial(torch.optim.SGD, lr=0.05)
model = GPT(GPTConfig(256, num_layers=4, **sizes))
predictor = Predictor(model, batch, World(2), optimizer=sgd)
measured = predictor.run((3,), "1f1b", 4, num_steps=20)
predictor.compare((3,), "1f1b", 4, measured=measured).figure()"""

SPLIT_POINTS = """\
wide = GPT(GPTConfig(5120, num_layers=3, **sizes))
wide_predictor = Predictor(wide, batch, World(2), optimizer=sgd)
costs = {"link": wide_predictor.link, "launch_s": wide_predictor.measured(4).launch_s}
SplitExplorer(wide, World(2), batch, (3,), num_microbatches=4, num_steps=8, **costs)"""


def write_notebook(path: Path) -> Path:
    """The two cells whose outputs are the pictures."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = list(map(new_code_cell, (TIMELINE, SPLIT_POINTS)))
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def take(lab: Lab, what: Locator, name: str) -> None:
    """Keep a picture of a part of the page, once every figure in it has its title: empty axes are drawn before."""
    what.wait_for()
    for figure in what.locator("xpath=descendant-or-self::*[contains(@class, 'js-plotly-plot')]").all():
        figure.locator(".gtitle").first.wait_for(timeout=60_000)
    lab.page.mouse.move(0, 0)  # a figure under the mouse has a bar of buttons over it
    lab.page.wait_for_timeout(1000)
    what.screenshot(path=FOLDER / name, animations="disabled")
    num_bytes = (FOLDER / name).stat().st_size
    print(f"docs/pictures/{name}: {num_bytes / 1e3:.0f} kB", flush=True)
    if num_bytes > MAX_BYTES:
        sys.exit(f"docs/pictures/{name} is larger than {MAX_BYTES / 1e3:.0f} kB: everybody who clones would have it")


def main() -> None:
    """Run both cells, press the widget's Run button, and keep what they show."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as jupyter:
        (Path(folder) / "source").mkdir()
        with jupyter.open(write_notebook(Path(folder) / "source" / "pictures.ipynb")) as lab:
            lab.page.set_viewport_size(PAGE)
            lab.page.keyboard.press("Control+b")  # closes the side bar
            lab.run_all()
            if errors := lab.errors():
                sys.exit("\n".join(errors))
            lab.page.evaluate(SHOW_CELL, 0)
            take(lab, lab.page.locator("[data-windowed-list-index='0'] .js-plotly-plot"), "timeline.png")

            cell = lab.show_widget("[role=slider]")
            cell.get_by_role("slider", name="cut").press("ArrowRight")
            cell.get_by_role("button", name="Run").click()
            lab.wait_until(lambda: "steps really ran" in cell.inner_text(), "the button shows its run", timeout_s=120)
            lab.wait_until_idle()
            take(lab, cell.locator(".widget-vbox").first, "split_points.png")


if __name__ == "__main__":
    main()
