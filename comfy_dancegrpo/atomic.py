"""Files that are whole, or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, own: str = "") -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames it when the block ends: a reader, or a crash, never sees half a file.

    own: tells what several processes write beside one path apart. Where the block raises (a full disk), what it wrote is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}{own}.part")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
