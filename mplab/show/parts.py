"""What all widgets have in common."""

from __future__ import annotations

import html
from functools import cache
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


def as_output(explorer: Any, **kwargs: Any) -> Any:
    """What a cell shows of an explorer: its `box`, and a sentence where no kernel runs it, as in a stored notebook."""
    words = f"{type(explorer).__name__}: a widget. Run this cell to use it."
    return explorer.box._repr_mimebundle_(**kwargs) | {"text/plain": words}


@cache
def ruler_class() -> Any:
    """The class of a widget that is not seen; its `width_px` is what the page has room for, as the browser says.

    A plotly figure alone would be 700 px wide until it is drawn again.

    Raises:
        MplabError: ipywidgets or anywidget is not installed.
    """
    ipywidgets_module()
    import anywidget
    from traitlets import Int

    class Ruler(anywidget.AnyWidget):
        """As wide as the page, and of no height."""

        _esm = """
        function render({ model, el }) {
          const watcher = new ResizeObserver(() => {
            if (!el.clientWidth) return;
            model.set("width_px", el.clientWidth);
            model.save_changes();
          });
          watcher.observe(el);
          return () => watcher.disconnect();
        }
        export default { render };
        """
        width_px = Int(0).tag(sync=True)

    return Ruler


def wide() -> dict[str, Any]:
    """How a slider over the whole width looks."""
    return {"layout": {"width": "95%"}, "style": {"description_width": "95px"}}


def round_s(seconds: float) -> str:
    """A round number of seconds, without digits that say nothing: "50 µs"."""
    for unit, size in (("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size * 0.999:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.4g} s"


def round_rate(bytes_s: float) -> str:
    """A round number of bytes a second: "100 MB/s"."""
    return f"{bytes_s / 1e9:.4g} GB/s" if bytes_s >= 1e9 else f"{bytes_s / 1e6:.4g} MB/s"
