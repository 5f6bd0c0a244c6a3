"""What a storage has of a run, told by a file that it holds itself; and which files of a run's folder go there.

`manifest-0000007.json` is the seventh of a run. It names the files, with their checksums, and holds the texts (settings, metrics) themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..atomic import replacing
from ..workflow.host import inside

NAME = re.compile(r"manifest-(\d{7,12})\.json")
NUMBERED = re.compile(r"checkpoints/(\d+)\.safetensors")
_MARK = Path("live") / "stored.json"  # in the folder on this machine: as whom it writes, and how far it and the storage were alike
_BLOCK = 2**23  # bytes that are copied at a time


class Manifest(NamedTuple):
    """A run as the storage has it. writer: a spool's own mark. texts: by name. files: (bytes, sha256) by name, in the run's folder, "/" between.

    Without texts there is no run: one that starts over ends the former so.
    """

    number: int
    writer: str
    iterations: int
    texts: dict[str, str]
    files: dict[str, tuple[int, str]]

    @classmethod
    def read(cls, data: bytes) -> Manifest:
        """Raises `ValueError`, `KeyError` or `TypeError` for what is none, or not whole."""
        told = json.loads(data)
        if told["sha256"] != _digest(told["run"]):
            raise ValueError("it differs from its checksum")
        return cls(**{**told["run"], "files": {name: (size, sha256) for name, (size, sha256) in told["run"]["files"].items()}})

    def data(self) -> bytes:
        run = {**self._asdict(), "files": {name: list(value) for name, value in self.files.items()}}
        return json.dumps({"sha256": _digest(run), "run": run}).encode()

    @property
    def seen(self) -> list[Any]:
        """By which it is known again."""
        return [self.writer, self.number]

    @property
    def finished(self) -> bool:
        try:
            return json.loads(self.texts["run.json"])["state"] == "finished"
        except (KeyError, TypeError, ValueError):
            return False


def _digest(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def copied(source: BinaryIO, target: BinaryIO | None = None, tell: Callable[[int], None] = lambda count: None) -> tuple[int, str]:
    """Copies an open file to another, or only reads it; its size in bytes and sha256. `tell` is given the bytes of each block."""
    size, digest = 0, hashlib.sha256()
    while data := source.read(_BLOCK):
        if target is not None:
            target.write(data)
        size += len(data)
        digest.update(data)
        tell(len(data))
    return size, digest.hexdigest()


def name_of(number: int) -> str:
    return f"manifest-{number:07d}.json"


def place(folder: Path, name: str) -> Path | None:
    """Where a file of a manifest belongs; None for one that no run copies there, or that leaves the folder."""
    path = inside(folder, name)
    return None if path is None or path == folder or path.relative_to(folder).parts[0].casefold() == "live" else path


def files(folder: Path) -> dict[str, Path]:
    """What of a run is copied, by its name there: all but what is of this machine alone, or is being written."""
    return {path.relative_to(folder).as_posix(): path for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() or path.suffix == ".part" or NAME.fullmatch(path.name):
            continue
        if path.is_file():
            yield path
        elif path.name != "live":
            yield from _files(path)


def texts(found: dict[str, Path]) -> dict[str, str]:
    """Of these files those that a manifest holds itself."""
    held = {}
    for name, path in found.items():
        if "/" not in name and path.suffix in (".json", ".jsonl"):
            with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):  # the latter is a file as any other
                held[name] = path.read_bytes().decode("utf-8")
    return held


def iterations(folder: Path) -> int | None:
    """How many the spool's record covers; None where there is no record."""
    try:
        return int(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("iterations", 0))
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        return 0


def read_mark(folder: Path) -> dict[str, Any]:
    """As `write_mark` wrote it; {} where this folder was neither copied to a storage nor fetched from one."""
    try:
        mark = json.loads((folder / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def write_mark(folder: Path, writer: str, there: Manifest | None) -> None:
    """there: what the storage has when the folder holds all of it."""
    mark = {"writer": writer, "iterations": there.iterations if there else 0, "seen": there and there.seen}
    with replacing(folder / _MARK) as beside:
        beside.write_text(json.dumps(mark) + "\n", encoding="utf-8")
