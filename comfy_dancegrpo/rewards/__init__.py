"""Rewards: one file each, and one line here. Importing this package imports none of them."""

from __future__ import annotations

import importlib
import re

from ..errors import RunError
from .base import FRAME_SCORES, Deferred, Kind, Reward, RewardFunction, Source, distinct, spread
from .places import EMBEDDED, PUBLISHED, available_bases, available_models, source

REWARDS: dict[str, Kind] = {
    "clip_score": Kind("clip_score", model_type="clip"),
    "jpeg_size": Kind("jpeg_size"),
    "shapes_agreement": Kind("shapes_agreement"),
}


def problem(name: str, model: str, base: str = PUBLISHED, device: str = "") -> str | None:
    """Why `load` would fail, in one line, found without loading anything; None when it would not."""
    try:
        source(name, REWARDS[name], model, base)
    except RunError as error:
        return str(error)
    if not re.fullmatch(r"(?:[a-z]+(?::\d+)?)?", device):
        return f'input "device": found {device!r}, accepted: such as cpu, cuda or cuda:1; empty for where the policy computes'
    return None


def load(name: str, model: str = EMBEDDED, batch_size: int = 32, base: str = PUBLISHED, **options) -> Reward:
    """The reward, whose weights are loaded when it first scores. `options`: other fields of `Reward`.

    Raises `RunError` where `problem` names one, `KeyError` on a name that is not in `REWARDS`.
    """
    kind = REWARDS[name]
    files = source(name, kind, model, base)

    def make() -> RewardFunction:
        module = kind.module if "." in kind.module else f"{__name__}.{kind.module}"
        return importlib.import_module(module).load(files)

    return Reward(name, Deferred(make), batch_size, whole_videos=kind.whole_videos, **options)
