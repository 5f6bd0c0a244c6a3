"""A run's LoRA in a folder that is the user's too. Importing this imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .. import headers
from ..atomic import replacing
from ..errors import RunError
from ..workflow.host import host


def put(path: Path, folder: Path) -> Path:
    """Links `RUN/lora/NAME.safetensors` into a folder, or copies it, and returns what it is there.

    A file that this program did not write, whole, stays as it is: the LoRA is then RUN-NAME.safetensors or the next free name, which is said.
    """
    listed = next(candidate for candidate in _names(path, folder) if not os.path.lexists(candidate) or is_ours(candidate))
    if listed.name != path.name:
        host().say(f"{folder / path.name} is there, and no LoRA of this program: it stays, and this one is listed as {listed.name!r}")
    if listed.exists() and listed.samefile(path):
        return listed
    with replacing(listed) as beside:
        beside.unlink(missing_ok=True)
        try:
            os.link(path, beside)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, beside)
    return listed


def is_ours(path: Path) -> bool:
    """Whether it is a whole file that `files.save` wrote."""
    try:
        return any(key.startswith("dancegrpo.") for key in headers.metadata(path))
    except (OSError, RunError):
        return False


def _names(path: Path, folder: Path) -> Iterator[Path]:
    stem = f"{path.parent.parent.name}-{path.stem}"
    yield folder / path.name
    yield folder / f"{stem}{path.suffix}"
    number = 2
    while True:
        yield folder / f"{stem}-{number}{path.suffix}"
        number += 1
