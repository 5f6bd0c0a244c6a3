"""environment.json: on what a run was trained; another entry where it went on with something changed. Importing this imports no torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from .. import __version__, processes
from .folder import RunFolder, write_atomically

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def note(folder: RunFolder, iteration: int) -> None:
    """Adds what this process runs on; the run goes on after `iteration`. Neither the machine's name nor the user's is written: reports are passed on."""
    entries, now = [entry for entry in read(folder.path) if entry["from_iteration"] <= iteration], _now()
    if not entries or any(entries[-1].get(key) != value for key, value in now.items()):
        entries.append({"from_iteration": iteration, "time": round(time.time(), 3), **now})
    write_atomically(folder.path / "environment.json", json.dumps(entries, indent=1) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries, oldest first; none where there is no such file, or a damaged one."""
    try:
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict) and isinstance(entry.get("from_iteration"), int)] if isinstance(found, list) else []


def _now() -> dict[str, Any]:
    import torch

    device = processes.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"comfy_dancegrpo": __version__, "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}", "device": f"{device.type}: {name}",
            "processes": processes.count(), "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "packages": {name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
