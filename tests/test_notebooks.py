"""What nbval lets pass in silence, and the layout of a lab: refused here, without running anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

LABS = Path(__file__).parent.parent / "labs"
NOTEBOOKS = sorted(LABS.glob("*.ipynb"))
MAX_CODE_LINES = 20
MAX_PROSE_WORDS = 120
MIN_CELLS, MAX_CELLS = 40, 65
MAX_FILE_BYTES = 1_000_000
Notebook = Any  # nbformat's node: a dictionary whose keys are attributes too


def complaints(notebook: Notebook, numbered: bool = True) -> list[str]:
    found = []
    code = [(index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    if "widgets" in notebook.metadata:
        found.append("widget state is stored: `make labs` strips it")
    if numbered and not MIN_CELLS <= len(notebook.cells) <= MAX_CELLS:
        found.append(f"{len(notebook.cells)} cells: a lab has {MIN_CELLS} to {MAX_CELLS}")
    for nth, (index, cell) in enumerate(code, start=1):
        num_lines = len(cell.source.splitlines())
        if not cell.source.strip():
            found.append(f"cell {index}: empty")
        if num_lines > MAX_CODE_LINES:
            found.append(f"cell {index}: {num_lines} lines of code, {MAX_CODE_LINES} at most")
        if cell.execution_count is None:
            found.append(f"cell {index}: never run, so nbval would not compare it")
        elif cell.execution_count != nth:
            found.append(f"cell {index}: run as number {cell.execution_count}, stands as {nth}: not from top to bottom")
        is_meant = "raises-exception" in cell.metadata.get("tags", [])
        if any(output.output_type == "error" for output in cell.outputs) != is_meant:
            found.append(f"cell {index}: an error is stored exactly where the tag raises-exception says so")
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and (num_words := prose_words(cell.source)) > MAX_PROSE_WORDS:
            found.append(f"cell {index}: {num_words} words of prose, {MAX_PROSE_WORDS} at most")
    return found


def prose_words(source: str) -> int:
    """Words of running text: code blocks and the rows of tables are not prose."""
    text = re.sub(r"^```.*?^```", "", source, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    return sum(any(character.isalnum() for character in word) for line in lines for word in line.split())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_notebook(path: Path) -> None:
    assert path.stat().st_size <= MAX_FILE_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert complaints(notebook, numbered=path.name[:2].isdigit()) == []


def a_good_lab() -> Notebook:
    """The smallest notebook with nothing to complain about."""
    code = [
        new_code_cell("1 + 1", execution_count=1, outputs=[new_output("execute_result", {"text/plain": "2"})]),
        new_code_cell(
            "raise ValueError",
            execution_count=2,
            metadata={"tags": ["raises-exception"]},
            outputs=[new_output("error", ename="ValueError", evalue="", traceback=[])],
        ),
    ]
    words = "word " * MAX_PROSE_WORDS
    text = words + "\n\n| a | table |\n\n```\nand code\n```\n"
    return new_notebook(cells=[*(new_markdown_cell(text) for _ in range(MIN_CELLS - len(code))), *code])


def test_a_good_lab_passes() -> None:
    assert complaints(a_good_lab()) == []


def store_widget_state(lab: Notebook) -> None:
    lab.metadata["widgets"] = {}


def drop_a_cell(lab: Notebook) -> None:
    del lab.cells[0]


def add_cells(lab: Notebook) -> None:
    lab.cells[:0] = [new_markdown_cell("one more") for _ in range(MAX_CELLS - MIN_CELLS + 1)]


def say_too_much(lab: Notebook) -> None:
    lab.cells[0].source = "more " + lab.cells[0].source


def write_long_code(lab: Notebook) -> None:
    lab.cells[-2].source = "x = 1\n" * (MAX_CODE_LINES + 1)


def leave_a_cell_empty(lab: Notebook) -> None:
    lab.cells[-2].source = ""


def forget_to_run(lab: Notebook) -> None:
    lab.cells[-2].execution_count, lab.cells[-2].outputs = None, []


def run_twice(lab: Notebook) -> None:
    lab.cells[-1].execution_count = 3


def store_an_error(lab: Notebook) -> None:
    lab.cells[-1].metadata["tags"] = []


def expect_an_error_in_vain(lab: Notebook) -> None:
    lab.cells[-1].outputs = []


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (store_widget_state, "widget state"),
        (drop_a_cell, "39 cells"),
        (add_cells, "66 cells"),
        (say_too_much, "121 words"),
        (write_long_code, "21 lines"),
        (leave_a_cell_empty, "empty"),
        (forget_to_run, "never run"),
        (run_twice, "run as number 3"),
        (store_an_error, "an error is stored"),
        (expect_an_error_in_vain, "an error is stored"),
    ],
)
def test_every_complaint_is_made(spoil: Callable[[Notebook], None], complaint: str) -> None:
    lab = a_good_lab()
    spoil(lab)
    assert [complaint in line for line in complaints(lab)] == [True]
