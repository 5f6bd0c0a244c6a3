"""A run in a few figures, from its folder's files: for lists, comparisons and the report. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import WorkflowError
from . import live, metrics
from .folder import RunFolder

WINDOW = 10  # iterations whose mean reward is told: an iteration alone has other prompts than the next


@dataclass(frozen=True)
class Overview:
    """state: as `live.read` tells it. iteration of iterations are done. first, last, best: mean rewards of `window` iterations; best_at: the last of
    the best's. seconds: of an iteration, the mean. changed: when an iteration was last written, seconds since 1970. seen: all that `live.read` tells.
    rows: of metrics.jsonl; watched: of watch.jsonl."""

    path: Path
    state: str
    iteration: int
    iterations: int
    window: int
    first: float | None
    last: float | None
    best: float | None
    best_at: int | None
    seconds: float | None
    changed: float | None
    seen: dict[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    watched: list[dict[str, Any]] = field(repr=False)


def of(path: Path) -> Overview:
    """Raises `WorkflowError` for a folder that is not a run's, or whose metrics are damaged."""
    try:
        seen, rows, watched = live.read(path), metrics.read(path / "metrics.jsonl"), metrics.read(path / "watch.jsonl")
        rewards = [float(row["reward_mean"]) for row in rows]
        seconds = [float(row["seconds"]["total"]) for row in rows]
        iterations = [int(row["iteration"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkflowError(f"{path}: its metrics are damaged ({error})") from None
    if not seen:
        raise WorkflowError(f"{path}: found no run there, accepted: the folder of a run, or a run's name and the --output that it is in")
    window = max(1, min(WINDOW, len(rewards) // 4))
    means = moving_mean(rewards, window)
    best = max(range(len(means)), key=lambda i: means[i] if math.isfinite(means[i]) else -math.inf, default=None)
    return Overview(path, str(seen["state"]), iterations[-1] if rows else 0, seen["iterations"], window, means[0] if means else None,
                    means[-1] if means else None, None if best is None else means[best], None if best is None else iterations[best + window - 1],
                    sum(seconds) / len(seconds) if seconds else None, rows[-1].get("time") if rows else None, seen, rows, watched)


def find(run: str, output: Path) -> Path:
    """The folder of a run, given as one or by its name. Raises `WorkflowError` where there is none."""
    for path in (Path(run), output / run):
        if (path / "run.json").is_file():
            return path
    raise WorkflowError(f"found {run!r}, accepted: the folder of a run, or the name of one in {output}")


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Of each `window` values in a row, `len(values) - window + 1` of them."""
    return [sum(values[i:i + window]) / window for i in range(len(values) - window + 1)] if values else []


def settings(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, class type, widgets) of the nodes of the run's prompt.json, by node id; none where it is missing or damaged."""
    try:
        prompt = json.loads((path / "prompt.json").read_text(encoding="utf-8"))
        nodes = [prompt[node_id] for node_id in sorted(prompt, key=lambda node_id: [(len(part), part) for part in node_id.split(":")])]
        return [(str((node.get("_meta") or {}).get("title") or node["class_type"]), str(node["class_type"]),
                 {name: value for name, value in node["inputs"].items() if not isinstance(value, (list, dict))}) for node in nodes]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def checkpoints(path: Path) -> list[tuple[int, str, int, float]]:
    """(iteration, "" or "best", bytes, when) of each checkpoint on disk, by iteration."""
    folder, found = RunFolder(path), []
    for kind, where in (("", folder.checkpoints), ("best", folder.best)):
        for file in where.glob("*.safetensors") if where.is_dir() else ():
            if file.stem.isdigit():
                status = file.stat()
                found.append((int(file.stem), kind, status.st_size, status.st_mtime))
    return sorted(found)
