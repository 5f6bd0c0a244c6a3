"""A reward that gave no scores: it stops the iteration, never becomes a number, and what it was given is kept in the run's folder."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RunError
from ..workflow.host import host

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "failed_reward"


@dataclass(frozen=True)
class Given:
    """What a call was about. pictures: [H, W, 3], or videos [F, H, W, 3], in 0..1; answer: what came in place of the scores, "" for nothing."""

    pictures: Tensor | Sequence[Tensor] = field(repr=False)
    prompts: Sequence[str] = field(repr=False)
    answer: str = field(default="", repr=False)


class RewardFault(RunError):
    """A call to a reward that failed, in one line; `given` is the part of the call that is at fault, where that is not the whole.

    may_pass: whether the same call may do better.
    """

    def __init__(self, line: str, given: Given | None = None, may_pass: bool = False):
        super().__init__(line)
        self.given, self.may_pass = given, may_pass


def may_pass(error: Exception) -> bool:
    """Whether to try again what failed so: what is known to be wrong stays wrong, and calls to a service have been tried again already."""
    return getattr(error, "may_pass", not isinstance(error, RunError))


def out_of_memory(error: Exception) -> bool:
    """Of the accelerator's, whatever its backend calls that, or of this machine's."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and (type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error))


def fault(name: str, error: Exception, whole: Given, tries: int = 1) -> RunError:
    """The error of the reward of that name in one line, with where what it was given is kept: in the run's folder, if there is a run."""
    said = f"reward {name!r}: {cause(error)}{f' ({tries} tries)' if tries > 1 else ''}"
    if host().run_folder is None:
        return RunError(said)
    try:
        folder = _keep(name, said, getattr(error, "given", None) or whole, host().run_folder / FOLDER)
    except OSError as failed:
        return RunError(f"{said} (what it was given could not be kept: {failed.strerror or failed})")
    return RunError(f"{said}; what it was given is in {folder}")


def cause(error: Exception) -> str:
    """In one line."""
    if isinstance(error, RunError):
        return str(error)
    if out_of_memory(error):
        return "out of memory; lower the reward's \"batch_size\", or give it a device of its own"
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _keep(name: str, said: str, given: Given, parent: Path) -> Path:
    """Writes a new folder in `parent`: fault.json, and a file for each picture or video."""
    from PIL import Image

    from ..pixels import to_bytes
    from ..runs import video
    from .base import FPS  # of videos that are kept: their own is not known here

    folder = _new_folder(parent, re.sub(r"[^\w-]+", "_", name))
    samples = []
    for number, (picture, prompt) in enumerate(zip(given.pictures, given.prompts)):
        path = folder / f"{number:04}.{'png' if picture.ndim == 3 else 'mp4'}"
        Image.fromarray(to_bytes(picture)).save(path) if picture.ndim == 3 else video.write(picture, path, FPS)
        reference = getattr(prompt, "picture", None)
        samples.append({"prompt": str(prompt), "file": path.name, **({"reference": reference.name} if reference else {})})
    record = {"reward": name, "fault": said, "answer": given.answer, "samples": samples}
    (folder / "fault.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def _new_folder(parent: Path, name: str) -> Path:
    for number in itertools.count(1):
        try:
            (folder := parent / f"{name}-{number}").mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
