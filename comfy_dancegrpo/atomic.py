"""Files that are whole, or not there."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_PATIENCE = 1.0  # seconds: Windows replaces no file that another process has open, and a reader has it for an instant


@contextlib.contextmanager
def replacing(path: Path, own: str = "") -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames it when the block ends: a reader, or a crash, never sees half a file.

    own: tells what several processes write beside one path apart. Where the block raises (a full disk), what it wrote is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}{own}.part")
    try:
        yield beside
        _replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what is told
            beside.unlink(missing_ok=True)
        raise


def _replace(source: Path, target: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > until:
                raise
        time.sleep(0.02)
