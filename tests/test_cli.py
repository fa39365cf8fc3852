"""`python -m mplab`: what it prints, and what a mistake gets."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mplab.__main__ as command_line
from mplab.bench import BENCHMARKS
from mplab.errors import MplabError
from mplab.homework.command import CHECKS
from mplab.parallel import Serial

ROOT = Path(__file__).parent.parent
TINY = ["--width", "16", "--layers", "1", "--steps", "3"]


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """nbval brings ipykernel into this process, which then looks like a notebook: a place for bars."""
    monkeypatch.setenv("MPLAB_ORDERED_OUTPUT", "1")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own, with one thread: two that share a busy machine wait for each other."""
    command = [sys.executable, "-W", "error", "-m", "mplab", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def losses(output: str) -> list[float]:
    """First, last and held-out loss as printed."""
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", output)]


def test_training_on_the_reference_lowers_the_loss() -> None:
    done = run("train", "--data", "text", "--steps", "40", "--width", "64")
    assert done.returncode == 0, done.stderr
    first, last, held_out = losses(done.stdout)
    assert 5 < first < 6
    assert last < first - 2
    assert held_out < first - 2
    assert "the Python language reference" in done.stdout
    assert done.stderr == ""  # no bar where nobody looks


def test_a_mistake_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "mplab.__main__")
    monkeypatch.setattr(sys, "argv", ["mplab", "train", "--data", "none.txt"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mplab", run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("mplab train: none.txt cannot be read")


def test_digits_and_own_files_train_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["train", "--data", "digits", "--steps", "30"]) == 0
    first, last, held_out = losses(capsys.readouterr().out)
    assert last < first - 0.5
    assert held_out < first - 0.5
    (tmp_path / "own.txt").write_text("to be or not to be, " * 100)
    assert command_line.main(["train", "--data", str(tmp_path / "own.txt"), *TINY]) == 0
    assert "own.txt, 2000 bytes; GPT of" in capsys.readouterr().out


def test_the_same_command_prints_the_same_losses(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("0", "0", "1"):
        assert command_line.main(["train", *TINY, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


class Terminal(io.StringIO):
    """A stderr that somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLAB_ORDERED_OUTPUT")
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert command_line.main(["train", *TINY]) == 0
    assert re.search(r"train: .*\d/3 ", terminal.getvalue())


def test_training_goes_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert command_line.main(["train", *TINY]) == 0
    assert len(losses(capsys.readouterr().out)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0: must be 1 or more"),
        (["--layers", "0", "--data", "digits"], "--layers 0: must be 1 or more"),
        (["--heads", "3"], "width 128 is not divisible by num_heads 3"),
        (["--batch-size", "0"], "batch_size 0, sequence 64: both must be 1 or more"),
        (["--batch-size", "2000", "--data", "digits"], "batch_size 2000: must be from 1 to the 1438 training samples"),
        (["--seed", "-1"], "seed -1: must be 0 or more"),
        (["--lr", "0"], "--lr 0.0: must be above 0"),
        (["--lr", "nan"], "--lr nan: must be above 0"),
        (["--lr", "1e30"], "the loss of step 2 is nan: lower --lr"),
        (["--width", "100000000"], "--width 100000000 --layers 2: weights, gradients and AdamW's moments take "),
        (["--width", "100000000", "--data", "digits"], "give a smaller model"),
        (["--device", "toaster"], "--device toaster is no device"),
        (["--device", "mps"], "--device mps is no device of mplab: give auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
    ],
)
def test_every_mistake_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mplab train: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "{plan} is no file: give the path of a plan"),
        ("", "--plan {plan}: a plan is a JSON object, and this is not JSON"),
        ('{"dp": 0}', "--plan {plan}: this plan can't be:\n  dp=0: must be a whole number"),
    ],
)
def test_a_mistake_in_a_plan_names_its_file(
    plan: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    if plan is not None:
        path.write_text(plan)
    assert command_line.main(["train", *TINY, "--plan", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mplab train: " + message.replace("{plan}", str(path)))


@pytest.mark.parametrize("option", ["--trace", "--save"])
def test_a_folder_that_cannot_be_made_is_told_before_any_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        arguments = ["--plan", str(tmp_path / "plan.json"), option, str(folder)]
        assert command_line.main(["train", *TINY, *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"mplab train: {option} {folder}: no ")
        assert said.err.count("\n") == 1


def test_checkpoints_without_safetensors_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "plan.json").write_text("{}")
    arguments = ["--plan", str(tmp_path / "plan.json"), "--save", str(tmp_path / "runs")]
    assert command_line.main(["train", *TINY, *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "checkpoints are safetensors files: pip install safetensors" in said.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("\ndef pass_right(comm, x) return x", ", line 2: SyntaxError: expected ':'"),
        ("import nope", ", line 1: ModuleNotFoundError: No module named 'nope'"),
        ("import json\njson.loads('{')", ", line 2: JSONDecodeError: "),
        ("def half(x):\n    return x / 0\n\nhalf(1)", ", line 2: ZeroDivisionError: division by zero"),
        ("def pass_right(comm, x): ...\nraise SystemExit(0)", ", line 2: SystemExit: 0"),
        ("\0", ": SyntaxError: source code "),
    ],
)
def test_an_exercise_in_a_file_that_does_not_run(
    code: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.py"
    path.write_text(code)
    assert command_line.main(["check", "pass_right", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mplab check: {path}{message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "arguments", "known"),
    [("bench", "[--json] NAME", BENCHMARKS), ("check", "EXERCISE FILE", tuple(CHECKS))],
)
def test_help_names_what_there_is_once(
    command: str, arguments: str, known: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"usage: python -m mplab {command} [-h] {arguments} " in text
    assert text.count(", ".join(known)) == 1


def test_an_option_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["train", "--steps", "many"])
    assert caught.value.code == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Serial, "step", interrupted)
    assert command_line.main(["train", *TINY]) == 130
    assert capsys.readouterr().err == "mplab train: stopped\n"


@pytest.mark.parametrize(("arguments", "unbuffered"), [(["--help"], ""), (["--help"], "1"), (["train", *TINY], "")])
def test_nobody_reads_the_output_any_more(arguments: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mplab", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in ("probe", "train", "bench", "check"))
    assert command_line.main([]) == 2
    assert command_line.main(["fly"]) == 2
    assert capsys.readouterr().err == "mplab: no command 'fly'; there are probe, train, bench, check\n"


@pytest.mark.parametrize("name", ["probe", "bench", "check"])
def test_a_command_gets_its_own_arguments_and_gives_its_status(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def main(arguments: list[str]) -> int:
        calls.append(arguments)
        if arguments == ["bad"]:
            raise MplabError("too bad")
        return 7

    monkeypatch.setattr(command_line, "import_module", {command_line.COMMANDS[name][0]: SimpleNamespace(main=main)}.get)
    assert command_line.main([name, "all_reduce", "--json"]) == 7
    assert command_line.main([name, "bad"]) == 2
    assert calls == [["all_reduce", "--json"], ["bad"]]
