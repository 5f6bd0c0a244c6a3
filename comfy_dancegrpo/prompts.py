"""Prompts: from a text, or from a .txt, .jsonl or .csv file."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from .errors import RunError
from .workflow.host import host, inside

SUFFIXES = (".txt", ".jsonl", ".csv")


@dataclass(frozen=True)
class PromptList:
    """Prompts in order; `name` is where they come from."""

    prompts: tuple[str, ...]
    name: str = "text"


def folders() -> list[Path]:
    """Where prompt files are looked for: the input folder, then those that ship with the package."""
    from .embedded import PROMPTS

    return [host().input_folder, PROMPTS]


def find(name: str) -> Path:
    """Raises `RunError` naming the folders searched, also for a name that leaves them."""
    for folder in folders():
        path = inside(folder, name)
        if path and path.is_file():
            return path
    raise RunError(f'input "file": found {name!r}, which is in none of the folders searched ({", ".join(map(str, folders()))})')


def read(name: str) -> list[str]:
    """The prompts of a file: a line each (.txt), the "prompt" of each object (.jsonl), the column "prompt" (.csv).

    Raises `RunError`, one line: the file is missing, not of these kinds, not UTF-8, malformed (with its line), or empty.
    """
    path = find(name)
    if path.suffix.lower() not in SUFFIXES:
        raise RunError(f'input "file": found {name!r}, accepted: a file that ends in {", ".join(SUFFIXES)}')
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f'input "file": {path} is not UTF-8 (byte {error.start})') from None
    parse = {".txt": _lines, ".jsonl": _jsonl, ".csv": _csv}[path.suffix.lower()]
    try:
        prompts = [p.strip() for p in parse(text) if p.strip()]
    except (ValueError, csv.Error) as error:
        raise RunError(f'input "file": {path}: {error}') from None
    if not prompts:
        raise RunError(f'input "file": {path} has no prompt in it')
    return prompts


def _lines(text: str) -> list[str]:
    """Not `str.splitlines`: that breaks at U+2028 and its like too, which a JSON string may hold as they are."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _jsonl(text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise ValueError(f"line {number} is not JSON") from None
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise ValueError(f'line {number}: accepted: an object with a text "prompt"')
        prompts.append(value["prompt"])
    return prompts


def _csv(text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if "prompt" not in (rows.fieldnames or ()):
        raise ValueError(f'found the columns {rows.fieldnames}, accepted: one named "prompt"')
    return [row["prompt"] or "" for row in rows]
