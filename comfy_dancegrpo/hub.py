"""The Hugging Face cache of this machine: what was downloaded before. No network is asked."""

from __future__ import annotations

import re
from pathlib import Path

from .workflow.host import inside

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(.+))?")


def folder() -> Path | None:
    """None where the library is missing that fills it: nodes are listed with the standard library alone."""
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        return None
    return Path(constants.HF_HUB_CACHE)


def cached(name: str) -> Path | None:
    """The folder of a hub id ("org/name"), or a file in it ("org/name/file"), in the snapshot that its main branch was at when it was downloaded.

    A name that leaves the snapshot is never found.
    """
    cache, parts = folder(), _NAME.fullmatch(name)
    if cache is None or parts is None or ".." in name:
        return None
    repository = cache / f"models--{parts[1].replace('/', '--')}"
    try:
        snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    path = inside(snapshot, parts[2]) if parts[2] else snapshot
    return path if path and path.exists() else None


def names(having: str) -> list[str]:
    """The hub ids in the cache whose snapshot has the file `having`."""
    cache = folder()
    folders = sorted(cache.glob("models--*--*")) if cache and cache.is_dir() else []
    found = (path.name.removeprefix("models--").replace("--", "/", 1) for path in folders)
    return [name for name in found if cached(f"{name}/{having}")]


def in_words(name: str) -> str:
    """For the end of a list of folders searched: the cache, where `name` may be in it."""
    return f", and the Hugging Face cache {folder()}" if _NAME.fullmatch(name) else ""


def to_get(name: str) -> str:
    """For the end of such a line: the command that fetches `name`, where it is a hub id or a file of one."""
    parts = _NAME.fullmatch(name)
    return f"; nothing is downloaded by itself: hf download {parts[1]}{f' {parts[2]}' if parts[2] else ''}" if parts else ""
