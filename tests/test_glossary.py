"""The words of the course: each is used in the lab that the glossary names; README's tables and pictures are true."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
LABS = sorted((ROOT / "labs").glob("[0-9][0-9]_*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_PICTURE_BYTES = 150_000


class Entry(NamedTuple):
    term: str
    chinese: str
    meaning: str
    lab: str


def rows(text: str, num_columns: int) -> list[list[str]]:
    """Of all tables with so many columns, without heads and rules."""
    lines = text.splitlines()
    of_tables = [line for line, after in zip(lines, [*lines[1:], ""], strict=True) if not after.startswith("|---")]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in of_tables
        if line.startswith("|") and not line.startswith("|---")
    ]
    return [row for row in cells if len(row) == num_columns]


def entries() -> list[Entry]:
    text = (ROOT / "GLOSSARY.md").read_text(encoding="utf-8")
    return [Entry(without_names(row[0]), *row[1:]) for row in rows(text, 4)]


def without_names(term: str) -> str:
    """What stands before the other names in parentheses."""
    return term.split(" (")[0]


@cache
def prose_of(lab: Path) -> str:
    cells = nbformat.read(lab, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def is_used(term: str, prose: str) -> bool:
    """Whether the term stands there as a word or several, with hyphens or blanks between, in italics or not."""
    return re.search(r"\b" + r"[\s*-]+".join(map(re.escape, re.split(r"[\s-]", term))), prose, re.I) is not None


GLOSSARY = entries()


def test_the_glossary_is_there() -> None:
    terms = [entry.term.lower() for entry in GLOSSARY]
    assert len(terms) > 50
    assert len(set(terms)) == len(terms), "a term has one entry"
    for entry in GLOSSARY:
        assert re.search("[\u4e00-\u9fff]", entry.chinese), f"{entry.term}: its Chinese is missing"
        assert entry.meaning, f"{entry.term}: what it means is missing"


@pytest.mark.parametrize("entry", GLOSSARY, ids=lambda entry: entry.term)
def test_a_term_is_used_in_its_lab(entry: Entry) -> None:
    (lab,) = [path for path in LABS if path.name.startswith(entry.lab + "_")]
    assert is_used(entry.term, prose_of(lab)), f"{lab.name} never says {entry.term}"


def test_use_is_seen_and_missed() -> None:
    assert is_used("micro-batch", "four *micro-batches*")
    assert is_used("split point", "cut or *split\npoint*")
    assert not is_used("ring", "string")
    assert not is_used("axis", "a mesh")


def test_the_course_in_readme_has_every_lab_and_its_question() -> None:
    questions = {}
    for lab in LABS:
        title, question = re.search(r"^# (.+)\n\n\*\*The question: (.+)\*\*$", prose_of(lab), re.M).groups()
        questions[f"[{title}](labs/{lab.name})"] = question
    assert dict(row for row in rows(README, 2) if "](labs/" in row[0]) == questions


def test_the_main_terms_in_readme_are_the_glossary_s() -> None:
    pairs = [pair for row in rows(README, 5) for pair in ((row[0], row[1]), (row[3], row[4]))]
    of_glossary = {entry.term: entry.chinese for entry in GLOSSARY}
    assert len(pairs) >= 10
    for term, chinese in pairs:
        assert of_glossary[term].startswith(chinese.split("（")[0]), term


def test_readme_s_pictures_are_small_and_said_in_words() -> None:
    pictures = re.findall(r"!\[(.*?)\]\((.+?)\)", README)
    assert len(pictures) == 2
    for words, path in pictures:
        assert len(words.split()) > 20, f"{path}: say what is seen"
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG")
        assert (ROOT / path).stat().st_size < MAX_PICTURE_BYTES
