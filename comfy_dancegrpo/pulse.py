"""What a process does, told to the launcher that watches for one that hangs: a small file each, overwritten at every move.

Without such a launcher nothing is written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "DANCEGRPO_PULSE"  # set by the launcher: the folder of these files
_LENGTH = 1024  # bytes, always all of them: a reader sees one whole line or none


class _Pulse:
    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0))
        self._told: dict[str, Any] = {"moves": 0, "waits": False, "keeps": False, "node": "", "run": ""}

    def tell(self, changes: dict[str, Any]) -> None:
        self._told |= {"moves": self._told["moves"] + 1, **changes}
        data = json.dumps(self._told).encode()
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, data[:_LENGTH].ljust(_LENGTH))


@functools.cache
def _own() -> _Pulse | None:
    folder = os.environ.get(FOLDER)
    return _Pulse(Path(folder) / os.environ.get("RANK", "0")) if folder and Path(folder).is_dir() else None


def tell(**changes: Any) -> None:
    """This process has moved. `node`: the title of the node that it runs from now on. `run`: the folder of its run."""
    if (own := _own()) is not None:
        own.tell(changes)


@contextlib.contextmanager
def _meanwhile(flag: str) -> Iterator[None]:
    tell(**{flag: True})
    try:
        yield
    finally:
        tell(**{flag: False})


def waiting() -> contextlib.AbstractContextManager[None]:
    """While the block runs, this process waits for others."""
    return _meanwhile("waits")


def keeping() -> contextlib.AbstractContextManager[None]:
    """While the block runs, this process writes what is to be left of a run: who ends it loses that."""
    return _meanwhile("keeps")


def read(folder: Path) -> dict[int, dict[str, Any]]:
    """What each process has told last, by its rank; {} of one that has told nothing yet."""
    found = {}
    for path in folder.glob("[0-9]*"):
        try:
            found[int(path.name)] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            found[int(path.name)] = {}
    return found
