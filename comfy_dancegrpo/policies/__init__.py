"""Model families: one file each, and one line here. Importing this package imports none of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RunError
from ..quiet import quiet_loading
from ..workflow.host import host

if TYPE_CHECKING:
    from .base import Policy

FAMILIES: dict[str, tuple[str, str]] = {
    # `_class_name` of a diffusers folder's model_index.json -> (module, class)
    "FluxPipeline": ("flux", "Flux"),
}
EMBEDDED = "embedded"
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("diffusers", "checkpoints", "diffusion_models")  # model folders that are searched, in this order


def available() -> list[str]:
    """Names that `load` takes: the embedded policy, and every diffusers folder in the model folders."""
    names = {name for kind in KINDS for name in host().list_models(kind)
             if (path := host().find_model(kind, name)) and (path / "model_index.json").is_file()}
    return [EMBEDDED, *sorted(names)]


def problem(name: str) -> str | None:
    """Why `load(name)` would fail, in one line, found without loading anything; None when it would not."""
    try:
        _family(find(name))
    except RunError as error:
        return str(error)
    return None


def find(name: str) -> Path:
    """The diffusers folder of a policy. Raises `RunError` naming the folders searched."""
    if name == EMBEDDED:
        from ..embedded import POLICY
        return POLICY
    for kind in KINDS:
        if path := host().find_model(kind, name):
            return path
    searched = ", ".join(str(folder) for kind in KINDS for folder in host().model_folders(kind))
    raise RunError(f'input "policy": found {name!r}, which is in none of the folders searched ({searched})')


def _family(folder: Path) -> tuple[str, str]:
    index = folder / "model_index.json"
    accepted = "accepted: a diffusers folder of " + ", ".join(FAMILIES)
    if not index.is_file():
        raise RunError(f'input "policy": found {folder}, which has no model_index.json; {accepted}')
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
        name = components["_class_name"]
        libraries = {value[0] for value in components.values() if isinstance(value, list) and value[0]}
    except (ValueError, KeyError, TypeError, IndexError):
        raise RunError(f'input "policy": found {index}, which names no pipeline class; {accepted}') from None
    if not isinstance(name, str) or name not in FAMILIES:
        raise RunError(f'input "policy": found {name} in {index}, a family that is not known; {accepted}')
    if odd := libraries - {"diffusers", "transformers"}:  # diffusers would import code of that name from the folder
        raise RunError(f'input "policy": found the library {odd.pop()!r} in {index}, accepted: diffusers and transformers')
    return FAMILIES[name]


def load(name: str, dtype: str = "float32") -> Policy:
    """Loads a policy's weights, frozen, onto this process's device. Raises `RunError` where `problem` names one."""
    folder = find(name)
    module, cls = _family(folder)
    with quiet_loading():
        return getattr(importlib.import_module(f".{module}", __name__), cls).load(name, folder, dtype)
