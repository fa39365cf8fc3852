"""Checkpoints on disk: what lies where, that one is whole or not there, and that damage is named, never loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from safetensors.torch import load_file
from torch import Tensor

from mplab.errors import CheckpointError, MplabError
from mplab.parallel import checkpoint_files as files

TESTS = Path(__file__).parent
SHARD = "rank-00000.safetensors"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug: what is written is there for all to read."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(root: Path, step: int, num_ranks: int = 2, length: int = 4, **more: Any) -> Path:
    """A checkpoint whose tensors all hold the number of its step."""
    folder = files.begin(root, step)
    shards = [
        files.write_shard(folder, rank, {f"{rank}.{name}": torch.full((length,), float(step)) for name in "ab"})
        for rank in range(num_ranks)
    ]
    return files.commit(root, step, shards, more)


def only_step(root: Path) -> int:
    """The step that every tensor of the newest checkpoint is from."""
    saved = files.Checkpoint(root)
    values = {value for name in saved.names for value in saved.read(name).unique().tolist()}
    assert len(saved.names) == 4
    assert values == {saved.manifest["step"]}
    return int(values.pop())


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}).encode()).hexdigest()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as somebody would who knows how it is sealed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- what lies where -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_folder_of_shards_and_a_manifest(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "runs"
    folder = save(root, 40, plan="a plan", position={"batch": 40})
    assert folder == root / "step-00000040"
    assert names_in(root) == ["step-00000040"]
    assert names_in(folder) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["step"] == 40
    assert manifest["plan"] == "a plan"
    assert manifest["position"] == {"batch": 40}
    assert manifest["sha256"] == digest(manifest)
    for rank, shard in enumerate(manifest["shards"]):
        path = folder / f"rank-{rank:05d}.safetensors"
        content = path.read_bytes()
        assert shard == {
            "file": path.name,
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "names": [f"{rank}.a", f"{rank}.b"],
        }
        assert load_file(path)[f"{rank}.a"].tolist() == [40.0] * 4  # any program reads them


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    x = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    tensors = {
        "turned": x.t(),
        "part": x[1:3, ::2],
        "parameter": torch.nn.Parameter(x + 0.1),
        "number": torch.tensor(3.0),
        "nothing": torch.empty(0, 3),
        "NaN": torch.tensor([float("nan"), float("inf"), -0.0]),
        **{str(dtype): x.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool)},
    }
    shard = files.write_shard(files.begin(tmp_path, 1), 0, tensors)
    files.commit(tmp_path, 1, [shard], {})
    saved = files.Checkpoint(tmp_path)
    assert saved.names == list(tensors)
    for name, tensor in tensors.items():
        got = saved.read(name)
        assert got.dtype == tensor.dtype
        assert not got.requires_grad
        torch.testing.assert_close(got, tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_what_is_read_twice_is_not_the_same_memory(tmp_path: Path) -> None:
    """The optimizer's state of two copies of a weight was one memory, updated twice a step."""
    save(tmp_path, 1)
    saved = files.Checkpoint(tmp_path)
    first, second = saved.read("0.a"), saved.read("0.a")
    first.zero_()
    assert second.tolist() == saved.read("0.a").tolist() == [1.0] * 4


def test_the_newest_is_taken(tmp_path: Path) -> None:
    for step in (2, 100_000_000, 10, 99_999_999):
        save(tmp_path, step)
    for other in ("step-", "step-7", "step-00000500.old", "my-step-00000500", "steps"):
        (tmp_path / other).mkdir()
    assert files.latest(tmp_path) == tmp_path / "step-100000000"
    assert files.latest(str(tmp_path)) == files.latest(tmp_path)
    assert files.latest(tmp_path / "step-00000002") == tmp_path / "step-00000002"
    assert files.Checkpoint(tmp_path / "step-00000002").manifest["step"] == 2


def test_no_checkpoint_says_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere has no checkpoint .*there is no such folder"):
        files.latest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="there is nothing"):
        files.latest(tmp_path)
    (tmp_path / "weights.pt").touch()
    with pytest.raises(CheckpointError, match=r"there is weights\.pt"):
        files.Checkpoint(tmp_path)


def test_a_name_that_is_not_saved_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-00000001 has no c: it is of another model or optimizer"):
        files.Checkpoint(tmp_path).read("c")


# --- there whole, or not at all --------------------------------------------------------------------------------------


def test_the_same_step_is_not_written_over(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / ".writing-step-00000004").mkdir()
    with pytest.raises(CheckpointError, match="has a checkpoint of step 3 already, and none is written over"):
        files.begin(tmp_path, 3)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert names_in(tmp_path) == [".writing-step-00000004", "step-00000003"]


def test_what_was_left_unfinished_goes_away_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for left in (".writing-step-00000002", ".writing-step-00000003"):
        (tmp_path / left).mkdir()
        (tmp_path / left / SHARD).write_bytes(b"half of it")
    (tmp_path / "notes.txt").write_text("mine")
    assert names_in(files.begin(tmp_path, 3)) == []
    assert names_in(tmp_path) == [".writing-step-00000003", "notes.txt", "step-00000001"]
    assert only_step(tmp_path) == 1


def test_all_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = Path.rename

    def log_fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def log_rename(path: Path, target: Path) -> Path:
        done.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "rename", log_rename)
    save(tmp_path, 1)
    assert done == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "manifest.json",
        ".writing-step-00000001",
        ".writing-step-00000001 -> step-00000001",
        tmp_path.name,
    ]


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from test_checkpoint_files import save

os.fsync = lambda descriptor: None

def saving(root, last_event, length):
    if last_event:  # each call that opens, makes, renames or removes a file tells before it does so
        def count(event, arguments):
            if event == "open" or event.startswith(("os.", "shutil.")):
                num = counted[0] = counted[0] + 1
                if num == last_event:
                    os.kill(os.getpid(), signal.SIGKILL)
        counted = [0]
        sys.addaudithook(count)
        save(root, 2)
        os._exit(0)
    for step in range(2, 1000):
        save(root, step, length=length)

for line in sys.stdin:
    root, last_event, length = line.split()
    child = os.fork()
    if not child:
        saving(Path(root), int(last_event), int(length))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts processes that save, each a fork of one that has imported everything."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to, self._from = process.stdin, process.stdout

    def start(self, root: Path, last_event: int = 0, length: int = 4) -> int:
        """A process that saves; before the `last_event`-th thing that it does to a file it is killed."""
        print(root, last_event, length, file=self._to, flush=True)
        return int(self._from.readline())

    def ended(self) -> int:
        return int(self._from.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Nursery(process)


def test_killed_before_any_of_the_things_that_a_save_does(tmp_path: Path, nursery: Nursery) -> None:
    found = []
    for last_event in range(1, 200):
        root = tmp_path / str(last_event)
        save(root, 1)
        nursery.start(root, last_event)
        status = nursery.ended()
        found.append(only_step(root))
        save(root, 3)
        assert only_step(root) == 3
        assert not list(root.glob(".writing-*"))
        if status == 0:  # it has not come to so many
            break
        assert status == -signal.SIGKILL
    assert found == sorted(found)
    assert found.count(1) > 8  # made, written, renamed
    assert found[-1] == 2


def kill_while_saving(root: Path, nursery: Nursery, num_kills: int, length: int = 50_000) -> tuple[int, int]:
    """Let a process save for ever, kill it, look; kills in the middle of a save, and finished checkpoints."""
    generator, num_in_the_middle, num_finished = torch.Generator().manual_seed(0), 0, 0
    for kill in range(num_kills):
        shutil.rmtree(root, ignore_errors=True)
        save(root, 1)
        child = nursery.start(root, length=length)
        time.sleep(0.002 + 0.04 * torch.rand((), generator=generator).item())
        os.kill(child, signal.SIGKILL)
        assert nursery.ended() == -signal.SIGKILL
        num_in_the_middle += bool(list(root.glob(".writing-*")))
        newest = only_step(root)
        assert len(list(root.glob("step-*"))) == newest, kill
        num_finished += newest - 1
        save(root, newest + 1)
        assert only_step(root) == newest + 1
        assert not list(root.glob(".writing-*"))
    return num_in_the_middle, num_finished


def test_killed_at_any_time_the_newest_is_whole(tmp_path: Path, nursery: Nursery) -> None:
    """Row 11 of the faults; `python tests/test_checkpoint_files.py` does it 50 times."""
    num_in_the_middle, _ = kill_while_saving(tmp_path / "runs", nursery, 12)
    assert num_in_the_middle > 0


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], r"has \d+ bytes, and the manifest says \d+"),
        (lambda x: x + b"\0", r"has \d+ bytes, and the manifest says \d+"),
        (lambda x: b"", r"has 0 bytes, and the manifest says \d+"),
        (lambda x: flipped(x, -1), r"is not what was written \(its SHA-256 differs\)"),
        (lambda x: flipped(x, 0), r"is not what was written \(its SHA-256 differs\)"),
        (lambda x: flipped(x, 20), r"is not what was written \(its SHA-256 differs\)"),
        (None, "is missing"),
    ],
    ids=["truncated", "longer", "empty", "flipped at the end", "flipped at the start", "flipped in a name", "missing"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_shard_is_named(
    change: Callable[[bytes], bytes] | None, message: str, rank: int, tmp_path: Path
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / f"rank-0000{rank}.safetensors"
    path.unlink() if change is None else damage(path, change)
    with pytest.raises(CheckpointError, match=f"{path.name} {message}.*: take another checkpoint"):
        files.Checkpoint(tmp_path)
    assert only_step(tmp_path / "step-00000001") == 1


def test_a_manifest_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 2) / "manifest.json"
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"manifest\.json can't be read .*: take another checkpoint"):
            files.Checkpoint(tmp_path)


def test_a_manifest_with_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    """A flipped digit of the step or of the learning rate is as bad as one of a weight."""
    path = save(tmp_path, 2, position={"batch": 17}, lr=0.1) / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(flipped(content, place))
        with pytest.raises(CheckpointError, match=r"manifest\.json|has no checkpoint"):
            files.Checkpoint(tmp_path)
    path.write_bytes(content)
    assert only_step(tmp_path) == 2


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"text"', "{}", "\udcff", '{"format": 1, "step": 1}', "[" * 9])
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (save(tmp_path, 2) / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        files.Checkpoint(tmp_path)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002/manifest\.json can't be read"):
        files.Checkpoint(tmp_path)


@pytest.mark.parametrize("other", [0, 2, "1", None])
def test_another_format_is_refused(other: object, tmp_path: Path) -> None:
    rewrite(save(tmp_path, 1), lambda manifest: manifest.update(format=other))
    with pytest.raises(CheckpointError, match=rf"is of format {other}, and this version reads 1"):
        files.Checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["file", "size_bytes", "sha256", "names"])
def test_a_shard_that_the_manifest_half_knows_is_refused(key: str, tmp_path: Path) -> None:
    rewrite(save(tmp_path, 1), lambda manifest: manifest["shards"][1].pop(key))
    with pytest.raises(CheckpointError, match=r"manifest\.json can't be read"):
        files.Checkpoint(tmp_path)


def test_a_name_that_its_file_has_not_is_refused(tmp_path: Path) -> None:
    rewrite(save(tmp_path, 1), lambda manifest: manifest["shards"][0]["names"].append("0.c"))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: 0\.c can't be read"):
        files.Checkpoint(tmp_path).read("0.c")


def test_files_that_were_compared_already_are_not_read_again(tmp_path: Path) -> None:
    """One rank compares them for all; what is cut since then is refused when it is read."""
    damage(save(tmp_path, 1) / SHARD, lambda x: x[:-1])
    saved = files.Checkpoint(tmp_path, check=None)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: 0\.a can't be read"):
        saved.read("0.a")
    assert saved.read("1.a").tolist() == [1.0] * 4


@pytest.mark.parametrize("form", ["../../{}", "../{}", "{absolute}", "..", ".", "", "/", "x/../../../{}"])
def test_no_file_outside_of_the_folder_is_read(form: str, tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    root = tmp_path / "runs"
    folder = save(root, 1)
    shutil.copy(folder / SHARD, outside)
    shutil.copy(folder / SHARD, root / "secret.safetensors")
    file = form.format(outside.name, absolute=outside)
    rewrite(folder, lambda manifest: manifest["shards"][0].update(file=file))
    with pytest.raises(CheckpointError, match="is missing: take another checkpoint"):
        files.Checkpoint(root)
    with pytest.raises(CheckpointError):
        files.Checkpoint(root, check=None).read("0.a")


class Trap:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["step-00000001/manifest.json", f"step-00000001/{SHARD}", "model.pt", ".metadata"])
def test_no_pickle_is_ever_loaded(name: str, tmp_path: Path) -> None:
    sprung, root = tmp_path / "sprung", tmp_path / "runs"
    content = pickle.dumps(Trap(sprung))
    if name.startswith("step"):
        save(root, 1)
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(content)
    torch.save(Trap(sprung), root / "more.pt")
    if name.endswith(SHARD):
        new = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        rewrite(root / "step-00000001", lambda manifest: manifest["shards"][0].update(new))
    for place in (root, root / name, root / "step-00000001", root / "more.pt"):
        with pytest.raises(CheckpointError):
            files.Checkpoint(place).read("0.a")
    assert not sprung.exists()
    pickle.loads(content)
    assert sprung.exists()  # the trap works


# --- disks that don't take it ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no small disk can be made here: {error}")
    if done.returncode:
        pytest.skip(f"no small disk can be made here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    save(small_disk, 1)
    with pytest.raises(
        CheckpointError, match=rf"{SHARD} can't be written \(.*(?i:space).*\); what was saved before is"
    ):
        save(small_disk, 2, length=100_000)
    assert only_step(small_disk) == 1
    save(small_disk, 2)
    assert only_step(small_disk) == 2
    assert names_in(small_disk) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("last_call", range(1, 6))
def test_a_disk_that_fills_up_at_any_time(last_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no small disk can be mounted: the n-th time that something is brought to disk it is full."""
    save(tmp_path, 1)
    num_calls = 0

    def full(descriptor: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == last_call:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"can't be written \(.*No space left on device\); .*as (it was|they were)"
        ):
            save(tmp_path, 2)
    newest = only_step(tmp_path)
    assert newest == (2 if last_call == 5 else 1)  # the fifth is after the rename
    save(tmp_path, 3)
    assert only_step(tmp_path) == 3


def test_a_library_that_can_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=rf"{SHARD} can't be written \(.*No space left"):
        save(tmp_path, 2)
    assert names_in(tmp_path) == [".writing-step-00000002"]


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "runs", tmp_path / ("x" * 300), Path("/proc/runs")):
        with pytest.raises(CheckpointError, match="no checkpoint can be written there"):
            files.begin(root, 1)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="no checkpoint can be written there"):
        files.begin(tmp_path, 1)
    tmp_path.chmod(0o700)


def test_the_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MplabError, match="checkpoints are safetensors files: pip install safetensors"):
        save(tmp_path, 2)
    with pytest.raises(MplabError, match="pip install safetensors"):
        files.Checkpoint(tmp_path).read("0.a")


if __name__ == "__main__":  # row 11, 50 times
    with suppress(FileNotFoundError):
        shutil.rmtree(sys.argv[1])
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        print(kill_while_saving(Path(sys.argv[1]), Nursery(process), 50))
