"""Checkpoints: the whole state of a learner, one safetensors file each, whose header holds a checksum of all of it.

What else an iteration depends on follows from its number alone: the prompts, every noise (keyed by seed and iteration), the learning rate, and
how many rows of metrics.jsonl there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from ..workflow.host import host

KEPT = 2
_CHECKSUM = "sha256"
_BEFORE_CHECKSUMS = {"iterations", "micro_batch"}  # the header's keys in older files; a damaged key of a newer one makes another set


class Checkpoint(NamedTuple):
    """tensors: the state after so many iterations. micro_batch, processes (0: not told): with which it was trained. fingerprint: of the workflow."""

    iterations: int
    tensors: dict[str, Tensor]
    micro_batch: int
    fingerprint: str = ""
    processes: int = 0

    def header(self) -> dict[str, str]:
        return {name: str(value) for name, value in self._asdict().items() if name != "tensors"}


def path_of(folder: Path, iterations: int) -> Path:
    return folder / f"{iterations:07d}.safetensors"


def save(folder: Path, checkpoint: Checkpoint, kept: int = KEPT) -> Path:
    """Writes it, to the disk itself; of those up to it the last `kept` stay (0: all). Raises `OSError` (a full disk), with the former ones untouched."""
    path, header = path_of(folder, checkpoint.iterations), checkpoint.header()
    with replacing(path) as beside:
        try:
            save_file(checkpoint.tensors, beside, metadata={**header, _CHECKSUM: checksum(header, checkpoint.tensors)})
        except SafetensorError as error:  # how it tells of a full disk
            raise OSError(str(error)) from error
        with beside.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name without what it names
    former = sorted(old for old in folder.glob("*.safetensors") if old.name <= path.name)  # a later one is damaged: it was passed over
    for old in former[:-kept] if kept else ():
        with contextlib.suppress(PermissionError):  # Windows deletes no file that is being copied to a storage; the next call tries again
            old.unlink()
    return path


def checksum(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """sha256 of the header and of each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def newest(folder: Path, fingerprint: str = "") -> Checkpoint | None:
    """The newest whole checkpoint, of this workflow where one is asked for, or None; one that is damaged is named and passed over."""
    paths = sorted(folder.glob("*.safetensors"), reverse=True)
    return next((found for path in paths if (found := load(path, "; the one before is used", fingerprint))), None)


def load(path: Path, otherwise: str = "", fingerprint: str = "") -> Checkpoint | None:
    """One checkpoint; a damaged one is named, and what is done `otherwise`."""
    try:
        found = _read(path)
        if fingerprint and found.fingerprint not in ("", fingerprint):
            raise ValueError("it is of another workflow")
        return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        host().say(f"checkpoint {path} is damaged ({' '.join(str(error).split())}){otherwise}")
        return None


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    told = header.pop(_CHECKSUM, None)
    if told != checksum(header, tensors) and not (told is None and header.keys() == _BEFORE_CHECKSUMS):
        raise ValueError("its content differs from its checksum")
    return Checkpoint(int(header["iterations"]), tensors, int(header["micro_batch"]), header.get("fingerprint", ""), int(header.get("processes", 0)))


class Writer:
    """Writes behind the training, one thing at a time. What fails there is raised by the next call here."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Calls `write` in a thread, once the one before has ended. What it writes must not change meanwhile."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until what was started has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises what has failed so far, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error
