"""A progress bar, where tqdm is installed and somebody looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], num_items: int, name: str, unit: str = "it") -> Iterator[T]:
    """The same items behind a bar that goes away when they end: in a terminal and in a notebook, silent elsewhere.

    With MPLAB_ORDERED_OUTPUT in the environment there is none, so that two runs of a notebook print the same.
    """
    is_ordered = bool(os.environ.get("MPLAB_ORDERED_OUTPUT"))
    if is_ordered or not (is_notebook() or sys.stderr.isatty()):
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    # A notebook paints whatever comes on stderr red, and leaves a red line where a bar has been.
    stream = sys.stdout if is_notebook() else sys.stderr
    yield from tqdm(items, total=num_items, desc=name, unit=unit, leave=False, file=stream)


def is_notebook() -> bool:
    """Whether this process is a notebook's kernel, whose stderr is no terminal and is looked at all the same."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
