"""Where a reward's weights are on this machine: `reward_models` and the Hugging Face cache. No network is asked."""

from __future__ import annotations

import json
from pathlib import Path

from .. import hub
from ..errors import RunError
from ..workflow.host import host
from .base import Kind, Source

EMBEDDED = "embedded"
PUBLISHED = "published"  # the base that the reward's publishers name
CONFIG = "config.json"
FOLDER = "reward_models"


def available_models() -> list[str]:
    """Names that a reward's `model` may take: the embedded one, and what lies in `reward_models`. Hub ids in the cache are taken too."""
    return [EMBEDDED, *host().list_models(FOLDER)]


def available_bases() -> list[str]:
    """Names that a reward's `base` may take."""
    return [PUBLISHED, *(name for name in host().list_models(FOLDER) if (find(name) / CONFIG).is_file())]


def find(name: str, input: str = "model") -> Path:
    """The file or the folder of that name. Raises `RunError` naming the folders searched."""
    if name == EMBEDDED:
        from ..embedded import REWARD
        return REWARD
    path = host().find_model(FOLDER, name) or hub.cached(name)
    if path is None:
        searched = ", ".join(map(str, host().model_folders(FOLDER)))
        raise RunError(f'input "{input}": found {name!r}, which is in none of the folders searched '
                       f"({searched}{hub.in_words(name)}){hub.to_get(name)}")
    return path


def source(name: str, kind: Kind, model: str, base: str = PUBLISHED) -> Source:
    """The files of a reward. Raises `RunError` when one is missing or of another kind than the reward takes."""
    if kind.takes_any:
        return Source(None if model == EMBEDDED else find(model), None if base == PUBLISHED else find(base, "base"))
    if not kind.has_model:
        return Source()
    try:
        path = _fitting(name, kind, model)
    except RunError as error:
        raise RunError(f"{error}{kind.published and f'; published: {kind.published}'}") from None
    if not kind.base or path.is_dir() and base == PUBLISHED and not kind.contains:
        return Source(path)
    return Source(path, _base(name, kind, base))


def _fitting(name: str, kind: Kind, model: str) -> Path:
    if model == EMBEDDED and not kind.embedded:
        raise RunError(f'input "model": found {model!r}, accepted for {name}: {kind.accepted}')
    path = find(model)
    if kind.contains and path.is_dir() and (path / kind.contains).is_file():
        return path
    if path.is_dir() and (kind.model_type is None or _model_type(path) != kind.model_type):
        raise RunError(f'input "model": found {path} (model_type {_model_type(path)!r}), accepted for {name}: {kind.accepted}')
    if path.is_file() and not path.name.endswith(kind.suffixes or ("\0",)):
        raise RunError(f'input "model": found {path}, accepted for {name}: {kind.accepted}')
    return path


def _base(name: str, kind: Kind, base: str) -> Path:
    if base != PUBLISHED:
        path = find(base, "base")
    else:
        short = kind.base.rpartition("/")[2]
        path = host().find_model(FOLDER, kind.base) or host().find_model(FOLDER, short) or hub.cached(kind.base)
        if path is None:
            searched = ", ".join(map(str, host().model_folders(FOLDER)))
            needs = f"{name} needs all of " if kind.base_whole else f"{name} needs the configuration and the tokenizer of "
            raise RunError(f'input "base": {needs}{kind.base}, which is in none of the folders '
                           f"searched ({searched}{hub.in_words(kind.base)}); put that folder there as {short!r}{hub.to_get(kind.base)}")
    if kind.base_type is not None and _model_type(path) != kind.base_type:
        raise RunError(f'input "base": found {path} (model_type {_model_type(path)!r}), accepted for {name}: '
                       f"a transformers folder of model_type {kind.base_type!r}, such as {kind.base}")
    return path


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
