"""JupyterLab in headless Chromium, as a learner has it: open a lab, run all its cells, move a slider, press a button.

Clicks and keys go through the page; what the cells then hold is read from JupyterLab's own model of the notebook,
because the page only has the cells that are in view.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:  # Playwright and nbformat load where they are used: a machine without them skips these tests
    from playwright.sync_api import Locator, Page

ROOT = Path(__file__).parent.parent
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_ARGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
START_TIMEOUT_S = 60
POLL_MS = 100
ANNOUNCEMENTS = "@jupyterlab/apputils-extension:announcements"


def find_chromium() -> str | None:
    """Where this machine has a Chromium, or None."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@dataclass
class Lab:
    """One notebook, open in JupyterLab."""

    page: Page
    path: Path
    page_errors: list[str] = field(default_factory=list)
    outside_requests: list[str] = field(default_factory=list)

    def run_all(self, timeout_s: float = 120) -> None:
        """Run every cell and wait until the kernel has nothing left to do."""
        self.choose("Run", "Run All Cells")
        self.wait_until_idle(timeout_s)

    def choose(self, menu: str, entry: str) -> None:
        """Click an entry of the menu bar, for example Kernel > Interrupt Kernel."""
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.get_by_role("menuitem", name=entry).first.click()

    def wait_until_idle(self, timeout_s: float = 60) -> None:
        """Wait until no cell is queued or running; one that raised ends the wait too: the rest is then dropped."""
        self.page.wait_for_function(IS_IDLE, timeout=timeout_s * 1e3, polling=POLL_MS)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
        """Ask again and again, and say what did not come about."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self.path.name}: not within {timeout_s:g} s: {what}; errors: {self.errors()}")
            self.page.wait_for_timeout(POLL_MS)

    def run_cell(self, index: int) -> None:
        """Select the cell with this index among all cells, and run it alone; does not wait."""
        self.page.evaluate(SHOW_CELL, index)
        self.page.keyboard.press("Control+Enter")

    def cells(self) -> list[dict[str, Any]]:
        """Every code cell: `source`, `execution_count`, `tags`, `outputs` (as the notebook file would hold them)."""
        return json.loads(self.page.evaluate(CODE_CELLS))

    def errors(self) -> list[str]:
        """Outputs that are errors, in cells that are not tagged raises-exception."""
        return [
            f"{cell['source']}\n{output['ename']}: {output['evalue']}"
            for cell in self.cells()
            for output in cell["outputs"]
            if output["output_type"] == "error" and "raises-exception" not in cell["tags"]
        ]

    def not_executed(self) -> list[str]:
        """Sources of the code cells that have no execution count."""
        return [cell["source"] for cell in self.cells() if cell["execution_count"] is None]

    def show_widget(self, selector: str) -> Locator:
        """Scroll to the first cell whose widgets have `selector`; returns the cell as it is on the page."""
        for index in self.page.evaluate(CELLS_WITH_WIDGETS):
            self.page.evaluate(SHOW_CELL, index)
            cell = self.page.locator(f".jp-Notebook-cell[data-windowed-list-index='{index}']")
            cell.locator(".jp-OutputArea-output .widget-box, .jp-OutputArea-output .lm-Widget").first.wait_for()
            if cell.locator(selector).count():
                return cell
        raise LookupError(f"no cell of {self.path.name} shows a widget with {selector}")


@dataclass
class Jupyter:
    """A running JupyterLab server and the browser that looks at it.

    One page shows one notebook after the other, and one kernel runs them: to load JupyterLab again for each takes a
    browser four times as long as all else, and a new kernel imports torch and plotly for longer than most cells run.
    What a notebook leaves in the kernel, names and widgets, is gone before the next; a test that fails ends the kernel.
    """

    browser: Any
    folder: Path
    address: str
    token: str
    page: Page | None = None
    kernel_id: str | None = None  # of the kernel that ran the notebook before

    @contextlib.contextmanager
    def open(self, source: Path, screenshot: Path | None = None) -> Iterator[Lab]:
        """Open a copy of a notebook without its stored outputs; on leaving, keep a picture of the page."""
        import nbformat

        path = self.folder / source.name
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, path)

        is_new = self.page is None or self.page.is_closed()
        page = self.page = self.browser.new_page() if is_new else self.page
        page.set_viewport_size({"width": 1280, "height": 1000})
        lab = Lab(page, path)
        host = urlsplit(self.address).netloc

        def note_request(request: Any) -> None:
            url = urlsplit(request.url)
            if url.scheme in ("http", "https", "ws", "wss") and url.netloc != host:
                lab.outside_requests.append(request.url)

        def note_error(error: Any) -> None:
            lab.page_errors.append(str(error))

        page.on("request", note_request)
        page.on("pageerror", note_error)
        try:
            try:
                if is_new:
                    page.goto(f"{self.address}/lab/tree/{path.name}?token={self.token}&reset")
                else:
                    page.evaluate(OPEN, [path.name, self.kernel_id])
                self.kernel_id = None
                page.wait_for_function(IS_OPEN, timeout=START_TIMEOUT_S * 1e3, polling=POLL_MS)
                yield lab
            finally:
                if screenshot is not None:
                    page.screenshot(path=screenshot)
            self.kernel_id = page.evaluate(FORGET, FORGET_IN_PYTHON)
        finally:
            page.remove_listener("request", note_request)
            page.remove_listener("pageerror", note_error)
            if self.kernel_id is None:
                self._end_page_and_kernels()
            else:
                page.evaluate(CLOSE)

    def _end_page_and_kernels(self) -> None:
        """What a test that failed left may wait for something, for ever."""
        self.page.close()
        url, token = f"{self.address}/api/kernels", f"token={self.token}"
        with urllib.request.urlopen(f"{url}?{token}", timeout=START_TIMEOUT_S) as answer:
            kernels = json.load(answer)
        for kernel in kernels:
            end = urllib.request.Request(f"{url}/{kernel['id']}?{token}", method="DELETE")
            urllib.request.urlopen(end, timeout=START_TIMEOUT_S).close()


@contextlib.contextmanager
def jupyterlab(folder: Path, **variables: str) -> Iterator[Jupyter]:
    """JupyterLab on 127.0.0.1 with a token, rooted at an empty `folder` of its own, and a headless Chromium.

    Its settings and its workspaces are in `folder` too: neither those of the user nor the repository are touched. The
    `variables` are added to the environment of its kernels.
    """
    from playwright.sync_api import sync_playwright

    config = folder / ".config"
    (config / "labconfig").mkdir(parents=True)
    (config / "labconfig" / "page_config.json").write_text(json.dumps({"disabledExtensions": {ANNOUNCEMENTS: True}}))
    token, port = secrets.token_hex(16), free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser"),
        *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
        *(f"--ServerApp.root_dir={folder}", "--ServerApp.allow_root=True", "--log-level=WARN"),
    ]
    environment = os.environ | {
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(config),
        "JUPYTER_RUNTIME_DIR": str(config / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(config / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(config / "workspaces"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        **variables,
    }
    environment.pop("PYTEST_CURRENT_TEST", None)  # a kernel that sees it captures no output of child processes
    log = config / "server.log"
    with running(command, environment, f"{address}/api/status?token={token}", log), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGS)
        try:
            yield Jupyter(browser, folder, address, token)
        finally:
            browser.close()


@contextlib.contextmanager
def voila(browser: Any, notebook: Path) -> Iterator[Page]:
    """A notebook as the page that Voila makes of it: its outputs alone. An error of the page is one of the test."""
    port, log = free_port(), notebook.with_suffix(".log")
    command = [sys.executable, "-m", "voila", str(notebook), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment.pop("PYTEST_CURRENT_TEST", None)
    with running(command, environment, f"http://127.0.0.1:{port}/voila/static/", log):
        page, errors = browser.new_page(viewport={"width": 1000, "height": 1000}), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            page.goto(f"http://127.0.0.1:{port}/", timeout=START_TIMEOUT_S * 1e3)
            yield page
        finally:
            page.close()
        assert errors == []


@contextlib.contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], url: str, log: Path) -> Iterator[None]:
    """A server, from when it answers to the end of the block."""
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as server:
        try:
            wait_until_it_answers(server, url, log)
            yield
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_it_answers(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:  # an answer too
            return
        except urllib.error.URLError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start within {START_TIMEOUT_S} s:\n{log.read_text()}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


NOTEBOOK = "const widget = window.jupyterapp?.shell?.currentWidget; const cells = widget?.content?.model?.cells;"

IS_OPEN = f"""() => {{
  {NOTEBOOK}
  return !!cells && cells.length > 0 && widget.context.sessionContext.session?.kernel?.status === "idle";
}}"""

OPEN = """async ([path, id]) => {
  const kernel = id ? { id } : undefined;
  await window.jupyterapp.commands.execute("docmanager:open", { path, factory: "Notebook", kernel });
}"""

# The kernel is as good as new for the next notebook, but for what is imported; one that does not answer is to end.
FORGET_IN_PYTHON = """
try:
    from ipywidgets import Widget
except ImportError:
    pass
else:
    Widget.close_all()
%reset -f
"""
FORGET = f"""async code => {{
  {NOTEBOOK}
  const kernel = widget.context.sessionContext.session.kernel;
  const forgotten = kernel.requestExecute({{ code, silent: true, store_history: false }}).done.then(() => kernel.id);
  return Promise.race([forgotten, new Promise(resolve => setTimeout(resolve, 10_000, null))]);
}}"""

# What was changed on the page is not asked about.
CLOSE = """async () => {
  const notebook = window.jupyterapp.shell.currentWidget;
  if (notebook.context.model.dirty) await notebook.context.save();
  notebook.close();
}"""

# A cell that is queued or running has no execution count yet ("*" in the margin).
IS_IDLE = f"""() => {{
  {NOTEBOOK}
  if (widget.context.sessionContext.session?.kernel?.status !== "idle") return false;
  const code = [...cells].filter(cell => cell.type === "code");
  if (code.some(cell => cell.executionState === "running")) return false;
  const raised = cell => cell.outputs.toJSON().some(output => output.output_type === "error")
    && !(cell.getMetadata("tags") ?? []).includes("raises-exception");
  return code.some(raised) || code.every(cell => cell.executionCount !== null || cell.sharedModel.source.trim() === "");
}}"""

CODE_CELLS = f"""() => {{
  {NOTEBOOK}
  return JSON.stringify([...cells].filter(cell => cell.type === "code").map(cell => ({{
    source: cell.sharedModel.source,
    execution_count: cell.executionCount,
    tags: cell.getMetadata("tags") ?? [],
    outputs: cell.outputs.toJSON(),
  }})));
}}"""

CELLS_WITH_WIDGETS = f"""() => {{
  {NOTEBOOK}
  const has_widget = cell => cell.type === "code"
    && cell.outputs.toJSON().some(output => output.data?.["application/vnd.jupyter.widget-view+json"]);
  return [...cells].flatMap((cell, index) => has_widget(cell) ? [index] : []);
}}"""

SHOW_CELL = f"""async index => {{
  {NOTEBOOK}
  widget.content.activeCellIndex = index;
  await widget.content.scrollToItem(index, "start");
}}"""
