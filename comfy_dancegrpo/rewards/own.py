"""The user's own rewards: those that installed packages offer, and the .py files of the folders that the user's settings name.

A workflow chooses among them by name alone. Names are known from entry points and file names: nothing is imported before it is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import settings
from ..errors import RunError
from ..workflow.host import host
from .base import Kind
from .places import FOLDER

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "comfy_dancegrpo.rewards"  # of entry points
CUSTOM = "custom"  # in reward_models: where such files are expected, once the settings name that folder
_NAME = re.compile(r"[A-Za-z]\w*(?:[.-]\w+)*", re.ASCII)


@dataclass(frozen=True)
class OwnKind(Kind):
    """A reward of the user's: `code` has `load(source)`, as the modules of this package have. It takes any model, or none."""

    code: Path | EntryPoint | None = None

    takes_any = True

    def __str__(self) -> str:
        return str(self.code) if isinstance(self.code, Path) else f"{self.code.value} of {self.code.dist.name}"

    def state(self) -> str:
        found = self.code.stat() if isinstance(self.code, Path) and self.code.is_file() else None
        return f"{self.code} {found.st_mtime_ns} {found.st_size}" if found else ""

    def check(self) -> None:  # nothing is executed
        if isinstance(self.code, Path):
            self._compiled()

    def imported(self) -> Any:
        try:
            made = self._executed() if isinstance(self.code, Path) else self.code.load()
        except RunError:
            raise
        except Exception as error:
            import traceback

            where = next((f", line {frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == str(self.code)), "")
            raise RunError(f"{self}{where}: {_in_words(error)}") from error
        if not callable(getattr(made, "load", None)):
            raise RunError(f"{self}: found no load(source), which gives the function that scores")
        return made

    def _executed(self) -> Any:
        """A module of its own each time: what the user has changed counts, and no __pycache__ is written beside models."""
        name = f"{__package__}.{CUSTOM}.{self.code.stem}"
        module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, self.code))
        code = self._compiled()
        sys.modules[name] = module  # as classes that are defined there expect
        try:
            exec(code, module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def _compiled(self) -> Any:
        try:
            return compile(self.code.read_bytes(), str(self.code), "exec")
        except (OSError, SyntaxError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise RunError(f"{self}{line}: {_in_words(error)}") from None


def found(taken: Collection[str]) -> tuple[dict[str, OwnKind], dict[str, str]]:
    """The user's rewards by name, and of each that cannot be had one line, by name too: its name is among `taken`, or is another's
    before it. By "": what is wrong with the settings."""
    kinds: dict[str, OwnKind] = {}
    lines: dict[str, str] = {}
    for name, kind in [*_files(lines), *((entry.name, OwnKind("", code=entry)) for entry in _entry_points())]:
        if not _NAME.fullmatch(name):
            lines[name] = f"{kind}: found the name {name!r}, accepted: letters, digits and \"_\", and \".\" and \"-\" between them"
        elif name in taken:
            lines[name] = f"{kind}: found the name {name!r}, which a reward of this program has, and keeps; accepted: another"
        elif name in kinds:
            lines[name] = f"{kind}: found the name {name!r}, which {kinds[name]} has, and keeps; accepted: another"
        else:
            kinds[name] = kind
    return kinds, lines


def why_not(name: str, taken: Collection[str]) -> str:
    """Of a reward that is none: the line about it, where there is one; else ""."""
    _, lines = found(taken)
    for line in filter(None, (lines.get(name), lines.get(""))):
        return f"; {line}"
    for folder in host().model_folders(FOLDER):
        if _NAME.fullmatch(name) and (path := folder / CUSTOM / f"{name}.py").is_file():
            return f'; {path} is not used, since "{settings.FOLDERS}" of your settings, {settings.path()}, does not name its folder'
    return ""


def _files(lines: dict[str, str]) -> Iterator[tuple[str, OwnKind]]:
    try:
        folders = settings.read().reward_folders
    except RunError as error:
        lines[""] = str(error)
        return
    for folder in folders:
        try:
            paths = sorted(path for path in Path(os.path.expanduser(folder)).iterdir() if path.suffix == ".py" and path.name[0] not in "._")
        except OSError as error:
            lines[""] = f'the settings {settings.path()}: "{settings.FOLDERS}": {folder}: {_in_words(error)}'
            continue
        yield from ((path.stem, OwnKind("", code=path)) for path in paths)


@functools.cache  # every installed package is looked through
def _entry_points() -> tuple[EntryPoint, ...]:
    import importlib.metadata  # with the parser of mail that it needs, a third of what the pack's import took

    return tuple(importlib.metadata.entry_points(group=GROUP))


def _in_words(error: Exception) -> str:
    said = (error.strerror if isinstance(error, OSError) else error.msg if isinstance(error, SyntaxError) else str(error)) or ""
    return ": ".join([type(error).__name__, *said.strip().splitlines()[:1]])
