"""Trackers (TensorBoard, Weights & Biases and others), through accelerate's: what is logged, by the first process alone.

Which of them is the user's to say, by `dancegrpo run --track` or in the user's settings; a workflow never does: a tracker may send a run to a
server. One that fails says so in a line and is left out; the run goes on. Importing this imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import processes, settings
from ..errors import RunError
from ..workflow.host import host
from . import overview
from .folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

PROJECT = "dancegrpo"  # where a tracker wants one; WANDB_PROJECT says another
NAMES = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "aim", "clearml", "dvclive", "swanlab")  # accelerate's; each is its package's name too
CONTINUED = ("tensorboard", "wandb")  # in which a resumed run goes on in the same log
PICTURED = ("tensorboard", "wandb", "swanlab")  # whose `log_images` takes a list of arrays
LONGEST = 250  # characters of a setting


def problem(name: str) -> str | None:
    """Why there can be no such tracker, in one line; None where there can. Loads nothing."""
    if name not in NAMES:
        return f"found the tracker {name!r}, accepted: {', '.join(NAMES)}"
    if not any(importlib.util.find_spec(package) for package in ((name, "tensorboardX") if name == "tensorboard" else (name,))):
        extra = f'"comfy-dancegrpo[{name}]"' if name in CONTINUED else name
        return f"the tracker {name!r} needs {name}, which is not installed: pip install {extra}"
    return None


def problem_of_settings() -> str | None:
    """The same of those that the user's settings name, or what is wrong with these."""
    try:
        found = next(filter(None, map(problem, settings.read().trackers)), None)
    except RunError as error:
        return str(error)
    return found and f'the settings {settings.path()}: "trackers": {found}'


def wanted() -> list[str]:
    """The command line's and the settings', each once."""
    return list(dict.fromkeys((*host().trackers, *settings.read().trackers)))


class Trackers:
    """Those of one run, from after `iteration` on; none in all processes but the first. watched: the evaluations of Watch that are logged already."""

    def __init__(self, folder: RunFolder, iteration: int, watched: int = 0):
        self._watched, self._open = watched, {}
        for name in wanted() if processes.is_first() else ():
            self._try(name, lambda: self._start(name, folder, iteration))

    def _start(self, name: str, folder: RunFolder, iteration: int) -> None:
        self._open[name] = tracker = _started(name, folder, iteration)
        config = {f"{title}.{key}": value if isinstance(value, (bool, int, float)) else str(value)[:LONGEST]
                  for title, _, widgets in overview.settings(folder.path) for key, value in widgets.items()}
        if name == "tensorboard":  # accelerate would make another folder of them, with the time for a name, at each start
            tracker.log({"settings": "".join(f"    {line}\n" for line in json.dumps(config, indent=1).splitlines())}, step=iteration)
        else:
            tracker.store_init_configuration(config)
        if iteration and name not in CONTINUED:
            host().say(f"tracker {name}: a log of its own begins after iteration {iteration}; {' and '.join(CONTINUED)} alone go on in the former one")

    def log(self, row: Mapping[str, Any], watched: Sequence[Mapping[str, Any]], pictures: Sequence[Image], prompt: str) -> None:
        """An iteration: its row of metrics.jsonl, all rows of watch.jsonl so far, of which the new ones are taken, and pictures where some were kept."""
        if not self._open:
            return
        new, self._watched = watched[self._watched:], len(watched)
        for name, tracker in list(self._open.items()):
            self._try(name, lambda: _log(name, tracker, row, new, pictures, prompt))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
        self._open.clear()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever its package raises: no log is worth a run
            self._open.pop(name, None)
            host().say(f"tracker {name}: {type(error).__name__}: {' '.join(str(error).split())}; it is left out from here on, and the run goes on")


def _log(name: str, tracker: Any, row: Mapping[str, Any], watched: Sequence[Mapping[str, Any]], pictures: Sequence[Image], prompt: str) -> None:
    for evaluation in watched:
        tracker.log({f"watch/{reward}": value for reward, value in evaluation["rewards"].items()}, step=evaluation["iteration"])
    step, values = row["iteration"], scalars(row)
    if pictures and name in PICTURED:
        import numpy as np

        arrays = [np.asarray(picture) for picture in pictures]
        given: dict[str, Any] = {"dataformats": "NHWC"} if name == "tensorboard" else {}
        tracker.log_images({"group": np.stack(arrays) if name == "tensorboard" else arrays}, step=step, **given)
        values["group/prompt"] = prompt
    tracker.log(values, step=step)  # last: TensorBoard's flushes


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers of a row by path: "train/reward_mean", "rewards/clip_score/mean", "seconds/total"."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and (prefix or key not in ("iteration", "time")):
            found[f"{prefix or 'train/'}{key}"] = value
    return found


def _started(name: str, folder: RunFolder, iteration: int) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    processes.tell_accelerate()
    if name not in LOGGER_TYPE_TO_CLASS:
        raise RunError("accelerate knows none of this name; a newer one may")
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # what a resumed run logs again takes the place of what was logged
        tracker = kind("tensorboard", str(folder.path), purge_step=iteration + 1 if iteration else 0)
    elif name == "wandb":
        import wandb

        tracker = kind(os.environ.get("WANDB_PROJECT", PROJECT), id=_id(folder, name), name=folder.name, dir=str(folder.path), resume="allow",
                       settings=wandb.Settings(console="off"))  # what the terminal shows is not sent
    else:
        tracker = kind(PROJECT, *([str(folder.path)] if kind.requires_logging_directory else []))
    start = getattr(tracker, "start", None)  # older ones of accelerate start when they are made
    if start is not None:
        start()
    return tracker


def _id(folder: RunFolder, name: str) -> str:
    """The run's own at a tracker, kept beside its files: a resumed run finds it there, one that starts over does not."""
    path = folder.path / "trackers.json"
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = {}
    if not isinstance(ids.get(name), str):
        ids[name] = uuid.uuid4().hex[:12]
        write_atomically(path, json.dumps(ids) + "\n")
    return ids[name]
