"""What loader nodes gave, kept between jobs: a policy or a reward is not loaded again for an input that has not changed."""

from __future__ import annotations

import json
from typing import Any

from comfy_dancegrpo.nodes import wires
from comfy_dancegrpo.policies.places import KINDS
from comfy_dancegrpo.workflow.graph import is_link
from comfy_dancegrpo.workflow.host import host
from comfy_dancegrpo.workflow.schema import inputs_of

_IMMUTABLE = {wires.POLICY, wires.REWARD}  # handles that nobody changes, so two jobs may share one


class Loaders:
    """`registry` is the given one, its loader classes replaced by ones that keep what they gave for the same inputs and files."""

    def __init__(self, registry: dict[str, type]):
        self._kept: dict[str, tuple] = {}
        self._names = {name for name, cls in registry.items() if _is_loader(cls)}
        self.registry = {name: self._keeping(name, cls) if name in self._names else cls for name, cls in registry.items()}

    def retain(self, prompt: dict[str, dict[str, Any]]) -> list[str]:
        """Forgets what this prompt does not ask for, so that its memory is free; returns the nodes that need not load."""
        asked = {node_id: _key(node["class_type"], node["inputs"]) for node_id, node in prompt.items()
                 if node["class_type"] in self._names and not any(map(is_link, node["inputs"].values()))}
        self._kept = {key: value for key, value in self._kept.items() if key in asked.values()}
        return [node_id for node_id, key in asked.items() if key in self._kept]

    def clear(self) -> None:
        self._kept = {}

    def _keeping(self, name: str, cls: type) -> type:
        load = getattr(cls, cls.FUNCTION)  # type: ignore[attr-defined]

        def keep(node: Any, **inputs: Any) -> tuple:
            key = _key(name, inputs)
            if key not in self._kept:
                self._kept[key] = load(node, **inputs)
            return self._kept[key]

        return type(cls.__name__, (cls,), {cls.FUNCTION: keep, "__module__": cls.__module__})  # type: ignore[attr-defined]


def _is_loader(cls: type) -> bool:
    """One of ours that makes handles of nothing but widget values."""
    types = getattr(cls, "RETURN_TYPES", ())
    if not types or not set(types) <= _IMMUTABLE or not cls.__module__.startswith("comfy_dancegrpo."):
        return False
    return all(item.is_widget or item.choices is not None for item in inputs_of(cls.INPUT_TYPES()).values())  # type: ignore[attr-defined]


def _key(name: str, inputs: dict[str, Any]) -> str:
    files = [_state_of(value) for value in inputs.values() if isinstance(value, str)]
    return json.dumps([name, inputs, files], sort_keys=True)


def _state_of(name: str) -> list:
    """The files of a model, with size and time: one that was replaced on disk is loaded again."""
    found = next((path for kind in (*KINDS, "reward_models") if (path := host().find_model(kind, name))), None)
    if found is None:
        return []
    files = sorted(p for p in found.rglob("*") if p.is_file()) if found.is_dir() else [found]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
