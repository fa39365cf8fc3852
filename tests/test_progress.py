"""A progress bar: only where somebody looks, and only where tqdm is."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from mplab.world.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_only_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_shell, notebook_shell = SimpleNamespace(), SimpleNamespace(kernel="a kernel")
    for stderr, shell, is_ordered, is_shown in (
        (io.StringIO(), None, "", False),
        (io.StringIO(), terminal_shell, "", False),
        (Terminal(), None, "", True),
        (Terminal(), None, "1", False),
        (io.StringIO(), notebook_shell, "", True),
        (io.StringIO(), notebook_shell, "1", False),
    ):
        stdout = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        monkeypatch.setenv("MPLAB_ORDERED_OUTPUT", is_ordered)
        assert list(progress("abc", 3, "letters")) == ["a", "b", "c"]
        shown, other = (stdout, stderr) if shell is notebook_shell else (stderr, stdout)
        assert ("letters" in shown.getvalue()) == is_shown
        assert "letters" not in other.getvalue()


def test_without_tqdm_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLAB_ORDERED_OUTPUT", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(progress("abc", 3, "letters")) == ["a", "b", "c"]
    assert terminal.getvalue() == ""
