"""What all widgets have in common."""

from __future__ import annotations

import html
from typing import Any

from mplab.errors import MplabError


def ipywidgets_module() -> Any:
    """The ipywidgets package, imported when a widget is made.

    Raises:
        MplabError: it, or anywidget, is not installed.
    """
    try:
        import anywidget  # noqa: F401  plotly's FigureWidget needs it
        import ipywidgets
    except ImportError:
        raise MplabError('an interactive figure needs ipywidgets and anywidget: pip install "mplab[lab]"') from None
    return ipywidgets


def paragraph(role: str, text: str) -> str:
    """A text that a screen reader says when it changes.

    Args:
        role: "status", or "alert" for an error.
        text: plain text.
    """
    style = "line-height: 1.5; margin: 0.3em 0; white-space: pre-line"
    return f'<p role="{role}" aria-live="polite" style="{style}">{html.escape(text)}</p>'


def error_paragraph(error: BaseException) -> str:
    """An error as an alert, with the notes on it: which rank raised it, and in which action."""
    return paragraph("alert", "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
