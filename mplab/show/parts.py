"""What all widgets have in common."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mplab.errors import MplabError
from mplab.trace.units import format_bandwidth


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
    if isinstance(error, KeyboardInterrupt):
        return paragraph("alert", "Interrupted before it was done: what is drawn is what was there before.")
    return paragraph("alert", "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))


def as_output(explorer: Any, **kwargs: Any) -> Any:
    """What a cell shows of an explorer: its `box`, and a sentence where no kernel runs it, as in a stored notebook."""
    words = f"{type(explorer).__name__}: a widget. Run this cell to use it."
    return explorer.box._repr_mimebundle_(**kwargs) | {"text/plain": words}


@cache
def page_class() -> Any:
    """The class of a widget that is not seen: what the page does for the box that it stands in.

    Its `width_px` is what the page has room for, as the browser says. It also names sliders and figures for those who
    hear the page, and gives a button that was pressed by keyboard the focus back.

    Raises:
        MplabError: ipywidgets or anywidget is not installed.
    """
    ipywidgets_module()
    import anywidget
    from traitlets import Int

    class Page(anywidget.AnyWidget):
        """As wide as the page, and of no height."""

        _esm = Path(__file__).with_name("page.js").read_text("utf-8")
        width_px = Int(0).tag(sync=True)

    return Page


def box_of(children: Iterable[Any], *figures: Any) -> Any:
    """All of an explorer, below each other, with figures that are as wide as the page.

    Args:
        children: from above to below.
        figures: those of them that are plotly's.
    """
    page = page_class()()

    def fit(change: object) -> None:
        for figure in figures:
            # Plotly puts a second legend where it would be in the plot that was there before: so once more, but not
            # while the page draws it for the first time, which would leave it empty.
            if figure.layout.width is not None:
                figure.layout.width = page.width_px - 1
            figure.layout.width = page.width_px

    page.observe(fit, names="width_px")
    return ipywidgets_module().VBox([page, *children])


def grid(children: Sequence[Any], least_px: int) -> Any:
    """Controls in two columns where the page is wide enough, below each other where it is not.

    Args:
        children: line by line.
        least_px: that each of them needs.
    """
    columns = f"repeat(auto-fit, minmax(max(min({least_px}px, 100%), 34%), 1fr))"  # a third one has no room
    return ipywidgets_module().GridBox(children, layout={"grid_template_columns": columns, "width": "100%"})


def run_button(name: str, does: str) -> Any:
    """The button that really runs what is drawn.

    Args:
        name: on it.
        does: what it does, for whoever waits over it.
    """
    return ipywidgets_module().Button(description=name, icon="play", button_style="primary", tooltip=does)


@contextmanager
def errors_in(result: Any) -> Iterator[None]:
    """Show an error in an HTML widget: one that leaves a callback goes to a log."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        result.value = error_paragraph(error)


@contextmanager
def pressed(button: Any, result: Any, meanwhile: str = "Running …") -> Iterator[None]:
    """What a button does: until it is done, the button says so and can't be pressed; an error is shown.

    Args:
        button: which has its name again after it.
        result: an HTML widget, for an error.
        meanwhile: the name of the button until then.
    """
    name = button.description
    button.disabled, button.description = True, meanwhile
    try:
        with errors_in(result):
            yield
    finally:
        button.disabled, button.description = False, name


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
    return format_bandwidth(bytes_s, num_digits=4)
