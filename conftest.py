"""Settings of `pytest --nbval labs`, here so that the bare command works, and from any folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

SANITIZERS = Path(__file__).parent / "tests" / "nbval_sanitize.cfg"
NBVAL_DEFAULT_TIMEOUT_S = 2000
CELL_TIMEOUT_S = 120


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not (getattr(option, "nbval", False) or getattr(option, "nbval_lax", False)):
        return
    import nbval.kernel

    option.nbval_current_env = option.nbval_kernel_name is None
    option.nbval_sanitize_with = option.nbval_sanitize_with or str(SANITIZERS)
    if option.nbval_cell_timeout == NBVAL_DEFAULT_TIMEOUT_S:  # what a dead kernel would cost
        option.nbval_cell_timeout = CELL_TIMEOUT_S
    start_new_kernel = nbval.kernel.start_new_kernel

    def start_lab_kernel(*args: Any, **kwargs: Any) -> Any:
        return start_new_kernel(*args, **kwargs, env=kernel_environment())

    nbval.kernel.start_new_kernel = start_lab_kernel


def kernel_environment() -> dict[str, str]:
    """This process's, without pytest's mark: a kernel that sees it captures no output of child processes.

    MPLAB_ORDERED_OUTPUT: what ranks print comes at the end of a run, in rank order, and not as it happens.
    OMP_WAIT_POLICY: torch's second thread, which waits in a loop, would take a core from the kernel of another worker.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return environment | {"MPLAB_ORDERED_OUTPUT": "1", "OMP_WAIT_POLICY": "passive"}


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):  # nbval's collector of one notebook
        # Differs between plotly's releases, and a FigureWidget has a random uid: cells assert on the data instead.
        collector.skip_compare += ("application/vnd.plotly.v1+json",)
