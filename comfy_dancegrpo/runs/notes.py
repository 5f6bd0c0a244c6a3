"""What a run's own files tell of it, for the metadata of the LoRA that it saves. Importing this imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..workflow.host import host
from . import metrics
from .folder import MAY_CHANGE

_TOLD = {"DanceGRPOLoadPolicy": "policy", "DanceGRPOLoopStart": "loop", "DanceGRPOGroupSample": "sample", "DanceGRPOAdvantage": "advantage",
         "DanceGRPOUpdate": "update"}  # the nodes whose widgets are a training's settings; those that a run may change on its way are left out


def of(folder: Path | None) -> dict[str, str]:
    """Of a run's folder: `dancegrpo.reward`, `dancegrpo.settings` (JSON), `dancegrpo.workflow` (sha256), `modelspec.resolution`.

    What is not known, and what is damaged, is left out: the LoRA is saved all the same.
    """
    if folder is None:
        return {}
    found: dict[str, Any] = {}
    for name, told in (("metrics.jsonl", _of_metrics), ("prompt.json", _of_prompt)):
        try:
            found |= told(folder / name)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            host().say(f"{folder / name} is damaged; the LoRA's metadata goes without it")
    return found


def _of_metrics(path: Path) -> dict[str, str]:
    rows = metrics.read(path)
    return {"dancegrpo.reward": ", ".join(f"{name} x {told['weight']:g}" for name, told in rows[-1]["rewards"].items())} if rows else {}


def _of_prompt(path: Path) -> dict[str, str]:
    prompt = json.loads(path.read_text(encoding="utf-8"))
    settings = _settings(prompt)
    size = settings.get("sample", {})
    resolution = {"modelspec.resolution": f"{size['width']}x{size['height']}"} if {"width", "height"} <= size.keys() else {}
    return resolution | {"dancegrpo.settings": json.dumps(settings, sort_keys=True), "dancegrpo.workflow": digest(prompt)}


def digest(prompt: dict[str, dict]) -> str:
    """sha256 of a workflow as executed: of its nodes, their inputs and links, not of their titles."""
    nodes = {node_id: {key: node[key] for key in ("class_type", "inputs")} for node_id, node in prompt.items()}
    return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()


def _settings(prompt: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """The widgets of the nodes that settings are at, by what the node does; of several of a kind the first by id."""
    found: dict[str, dict[str, Any]] = {}
    for node_id in sorted(prompt, key=lambda node_id: (len(node_id), node_id)):
        node = prompt[node_id]
        if (kind := _TOLD.get(node["class_type"])) is not None and kind not in found:
            found[kind] = {name: value for name, value in node["inputs"].items() if not isinstance(value, (list, dict)) and name not in MAY_CHANGE}
    return found
