"""Which tests this machine can run."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from browser import CHROMIUM_NAMES, find_chromium
from hypothesis import settings

# No time makes a test fail.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {"gpu": why_no_gpu(), "browser": why_no_browser()}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def why_no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA device, and torch sees none"


def why_no_browser() -> str | None:
    if importlib.util.find_spec("playwright") is None or importlib.util.find_spec("jupyterlab") is None:
        return 'needs Playwright and JupyterLab: pip install -e ".[lab,test]"'
    if find_chromium() is None:
        return f"needs a Chromium: none of {', '.join(CHROMIUM_NAMES)} is on the PATH"
    return None
