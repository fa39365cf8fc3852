"""Reads what a plan or a machine is written as: one JSON object, which a person may have written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mplab.errors import MplabError


def read_object(what: str, text: str | bytes, names: Sequence[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    """The values by their names.

    Args:
        what: it is, for an error: "a plan".
        text: JSON.
        names: that it may have.
        needed: those of them that it must have.

    Raises:
        MplabError: no JSON, or what `check_names` refuses.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise MplabError(f"{what} is a JSON object, and this is not JSON ({error})") from None
    return check_names(what, values, names, needed)


def check_names(what: str, values: object, names: Sequence[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    """The values, if they are an object with these names.

    Args:
        what: as for `read_object`.
        values: what JSON made of it.
        names: that it may have.
        needed: those of them that it must have.

    Raises:
        MplabError: no object, names that it may not have, or lacks.
    """
    remedy = f"give a JSON object with {'some of ' * (not needed)}{', '.join(names)}"
    if not isinstance(values, dict):
        raise MplabError(f"{what} is no {type(values).__name__}: {remedy}")
    if unknown := sorted(values.keys() - set(names)):
        raise MplabError(f"{what} has not {unknown}: {remedy}")
    if missing := [name for name in needed if name not in values]:
        raise MplabError(f"{what} lacks {', '.join(missing)}: give all of {', '.join(needed)}")
    return values


def read_file(path: str | Path, what: str, kind: str) -> bytes:
    """What is in a file that `kind.save` wrote.

    Raises:
        MplabError: no such file.
    """
    if not Path(path).is_file():
        raise MplabError(f"{path} is no file: give the path of {what}, as {kind}.save writes it")
    return Path(path).read_bytes()
