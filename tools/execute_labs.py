"""Format the labs, run each from top to bottom in a fresh kernel, and keep its outputs without the widgets' state.

python tools/execute_labs.py [labs/01_collectives.ipynb ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# The first three are the ones that change in each run; a figure's widget state alone is 5 MB.
VOLATILE_KEYS = "metadata.widgets metadata.language_info.version cell.metadata.execution"


def execute(path: Path) -> None:
    """Run one notebook in its own folder and write its outputs back."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        # Dropping the state while a widget is still in use has crashed the client: it is stored, then stripped.
        store_widget_state=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    nbformat.write(notebook, path)


def main() -> None:
    """Ruff, execute, strip: in this order, so that the stored cells are the ones that ran."""
    labs = [Path(name).resolve() for name in sys.argv[1:]] or sorted((ROOT / "labs").glob("*.ipynb"))
    if not labs:
        sys.exit("no notebook in labs/")
    subprocess.run([BIN / "ruff", "check", "--fix", *labs], check=True)
    subprocess.run([BIN / "ruff", "format", *labs], check=True)
    os.environ["MPLAB_ORDERED_OUTPUT"] = "1"  # as under nbval: what ranks print is stored in rank order
    for lab in labs:
        start_s = time.monotonic()
        execute(lab)
        print(f"{lab.name}: {time.monotonic() - start_s:.1f} s", flush=True)
    subprocess.run(
        [BIN / "nbstripout", "--keep-output", "--keep-count", "--extra-keys", VOLATILE_KEYS, *labs], check=True
    )


if __name__ == "__main__":
    main()
