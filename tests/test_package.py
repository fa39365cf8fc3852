"""The package from outside: what `import mplab` needs, what it costs, and on which floor each room stands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
# What only some functions need, and a machine that runs training scripts does not have.
OPTIONAL = """
plotly anywidget ipywidgets IPython ipykernel jupyterlab jupyter_client nbformat sklearn tqdm pandas tensorboard
transformers safetensors
"""


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden by the test)", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """Said by a Python without the optional ones: the seconds of `import mplab`, then what could not be imported."""
    return run_python(
        BLOCK
        + """
import time
import numpy, torch

start_s = time.perf_counter()
import mplab
print(time.perf_counter() - start_s)

import importlib, pkgutil
for module in pkgutil.walk_packages(mplab.__path__, "mplab."):
    if module.name != "mplab.__main__":
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(module.name, error)
"""
    ).splitlines()


def test_import_needs_torch_and_numpy_alone(imported: list[str]) -> None:
    assert float(imported[0]) > 0


def test_every_module_imports_without_the_optional_ones(imported: list[str]) -> None:
    assert imported[1:] == []


def test_the_optional_ones_are_really_hidden() -> None:
    with pytest.raises(AssertionError, match="hidden by the test"):
        run_python(BLOCK + "import plotly")


def test_import_time_is_shown(imported: list[str], record_property: Callable[[str, object], None]) -> None:
    """Measured beyond torch's own import and printed (pytest -rP), never judged."""
    seconds = float(imported[0])
    record_property("import_mplab_s", seconds)
    print(f"import mplab: {seconds * 1e3:.0f} ms beyond torch and numpy")


def test_core_dependencies_are_torch_and_numpy() -> None:
    names = [re.split(r"[<>=]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]]
    assert names == ["torch", "numpy"]


def test_every_dependency_has_a_range_and_a_reason() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]:
        name = re.split(r"[<>=]", requirement)[0]
        assert re.search(r"==|>=.+,<", requirement), requirement
        assert f"| {name} |" in contributing, f"{name} has no line in CONTRIBUTING.md"


FLOORS = (
    "errors, private < trace < plan < comm < world < models, datasets < parallel < show, homework, bench < __main__"
)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed: it comes with the dev extra")
    command = [linter, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_contract_has_the_floors_of_the_design() -> None:
    (contract,) = PROJECT["tool"]["importlinter"]["contracts"]
    assert [set(floor.split(" | ")) for floor in reversed(contract["layers"])] == [
        set(floor.split(", ")) for floor in FLOORS.split(" < ")
    ]
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


VIOLATIONS = {
    "mplab.trace is not allowed to import mplab.comm": ("trace/upward.py", "import mplab.comm"),
    "mplab.plan is not allowed to import mplab.world": (
        "plan/upward.py",
        "def f():\n    from mplab.world import World",
    ),
    "mplab.comm is not allowed to import mplab.world": ("comm/through_the_roof.py", "from mplab import World"),
    "mplab.show is not allowed to import mplab.bench": ("show/sideways.py", "import mplab.bench"),
}


@pytest.mark.parametrize(
    "violations", [VIOLATIONS, {"mplab.attic": ("attic.py", "")}], ids=["imports", "a room without a floor"]
)
def test_the_contract_breaks_on_a_violation(tmp_path: Path, violations: dict[str, tuple[str, str]]) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "mplab", tmp_path / "mplab", ignore=shutil.ignore_patterns("__pycache__"))
    for file, line in violations.values():
        (tmp_path / "mplab" / file).write_text(line + "\n", "utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    for complaint in violations:
        assert complaint in done.stdout
