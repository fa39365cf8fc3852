"""Checkpoints on disk: whole tensors in safetensors files, and a manifest that knows each file's size and SHA-256.

    runs/step-00000040/rank-00000.safetensors
                       rank-00001.safetensors
                       manifest.json

A checkpoint is written under another name and renamed when all of it is on disk, so what has a checkpoint's name is
complete. Nothing in it is ever executed: safetensors holds bytes, and the manifest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mplab.errors import CheckpointError, MplabError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


def begin(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step into; what an earlier save left unfinished goes away.

    Raises:
        CheckpointError: there is one of this step already, or the folder can't be made.
    """
    try:
        if (root / f"step-{step:08d}").exists():
            raise CheckpointError(
                f"{root} has a checkpoint of step {step} already, and none is written over: give another folder, or "
                "remove that one"
            )
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".writing-*"):
            shutil.rmtree(left)
        folder = writing(root, step)
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(f"{root}: no checkpoint can be written there ({error})") from error
    return folder


def writing(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is while it is written."""
    return root / f".writing-step-{step:08d}"


def write_shard(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write what one rank has to write.

    Args:
        folder: what `begin` gave, on a disk that all ranks see.
        rank: whose.
        tensors: whole, by name.

    Returns:
        What the manifest must say of the file.

    Raises:
        CheckpointError: the disk is full, or the file can't be written.
    """
    path = folder / f"rank-{rank:05d}.safetensors"
    write(path, tensors)
    return {"file": path.name, "size_bytes": path.stat().st_size, "sha256": _sha256(path), "names": list(tensors)}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, and wait until it is on disk.

    Raises:
        CheckpointError: the disk is full, or the file can't be written.
    """
    library = safetensors_library()
    try:
        library.save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path)
        _sync(path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(f"{path} can't be written ({error}); what was saved before is as it was") from error


def commit(root: Path, step: int, shards: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> Path:
    """Write the manifest, and give the folder its name.

    Args:
        root: of all checkpoints.
        step: whose.
        shards: what `write_shard` gave on each rank.
        more: what else a reader must know; what JSON can write.

    Returns:
        The finished checkpoint's folder.

    Raises:
        CheckpointError: it can't be written.
    """
    folder, final = writing(root, step), root / f"step-{step:08d}"
    manifest = {"format": FORMAT, "step": step, "shards": list(shards), **more}
    manifest["sha256"] = _digest(manifest)
    try:
        with (folder / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(folder)
        folder.rename(final)
        _sync(root)
    except OSError as error:
        raise CheckpointError(f"{final} can't be written ({error}); earlier checkpoints are as they were") from error
    return final


def latest(root: str | Path) -> Path:
    """The newest checkpoint in a folder, or the folder itself if it is one.

    Raises:
        CheckpointError: there is none.
    """
    root = Path(root)
    if (root / MANIFEST).is_file():
        return root
    found = [(int(name[1]), path) for path in root.glob("step-*") if (name := _NAME.fullmatch(path.name))]
    if not found:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:5]) if root.is_dir() else "no such folder"
        raise CheckpointError(f"{root} has no checkpoint (step-..., with a {MANIFEST}): there is {there or 'nothing'}")
    return max(found)[1]


class Checkpoint:
    """A checkpoint whose files are all there and unchanged.

    Args:
        folder: of one checkpoint, or of several: then the newest.
        check: (i, n): compare every n-th file with the manifest, from the i-th on; None: none of them.

    Raises:
        CheckpointError: none there, a manifest that can't be read, a file that is missing, cut or changed.
    """

    def __init__(self, folder: str | Path, check: tuple[int, int] | None = (0, 1)) -> None:
        self.folder = latest(folder)
        self._open: dict[str, Any] = {}
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text())
            if self.manifest["format"] != FORMAT:
                raise CheckpointError(
                    f"{self.folder / MANIFEST} is of format {self.manifest['format']}, and this version reads {FORMAT}"
                )
            if self.manifest["sha256"] != _digest(self.manifest):
                raise CheckpointError(
                    f"{self.folder / MANIFEST} is not what was written (its SHA-256 differs): take another checkpoint"
                )
            shards = [(shard["file"], shard["size_bytes"], shard["sha256"]) for shard in self.manifest["shards"]]
            self._file_of = {name: shard["file"] for shard in self.manifest["shards"] for name in shard["names"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / MANIFEST} can't be read ({error}): take another checkpoint"
            ) from None
        for name, size_bytes, digest in shards[check[0] :: check[1]] if check else ():
            path = self.folder / Path(str(name)).name  # never out of the folder
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: take another checkpoint")
            if path.stat().st_size != size_bytes:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size} bytes, and the manifest says {size_bytes}: take another "
                    "checkpoint"
                )
            if _sha256(path) != digest:
                raise CheckpointError(f"{path} is not what was written (its SHA-256 differs): take another checkpoint")

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU.

        Raises:
            CheckpointError: it has none of this name, or a file that is none of safetensors.
        """
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no {name}: it is of another model or optimizer")
        file = Path(str(self._file_of[name])).name
        library = safetensors_library()
        try:
            if file not in self._open:
                self._open[file] = library.safe_open(self.folder / file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)
        except Exception as error:  # safetensors has an error of its own
            raise CheckpointError(f"{self.folder / file}: {name} can't be read ({error})") from None
        return tensor.clone()  # what is read twice would be the same memory, and lie in the file's


def _digest(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of all that a manifest says but this."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "sha256"})
    return hashlib.sha256(json.dumps(json.loads(text)).encode()).hexdigest()


def safetensors_library() -> Any:
    """What reads and writes the files.

    Raises:
        MplabError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise MplabError("checkpoints are safetensors files: pip install safetensors") from None
    return safetensors.torch


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
