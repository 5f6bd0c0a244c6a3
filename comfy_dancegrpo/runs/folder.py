"""The run folder: what one training leaves on disk.

    workflow.json   the workflow as given            metrics.jsonl  a line per iteration
    prompt.json     the workflow as executed         watch.jsonl    a line per evaluation of Watch
    run.json        fingerprint, state, and, while   summary.json   evaluations of Evaluate
                    it runs, who trains it           report.html    all of it, for people
    environment.json  what it ran on                 images/  pictures/  checkpoints/  lora/  live/
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..atomic import replacing
from ..errors import RunError
from ..workflow.host import host
from . import lock

if TYPE_CHECKING:
    from filelock import BaseFileLock

ON_EXISTING = ("new", "resume", "restart")
ON_OUT_OF_MEMORY = ("stop", "halve")
MAY_CHANGE = ("run_name", "iterations", "checkpoint_every", "on_existing", "micro_batch", "gradient_checkpointing", "checkpoints_kept",
              "on_out_of_memory", "max_skipped_steps", "processes")  # without it being another run
WRITTEN = ("workflow.json", "prompt.json", "run.json", "metrics.jsonl", "watch.jsonl", "summary.json", "images", "videos", "checkpoints", "lora", "live",
           "environment.json", "report.html", "pictures", "trackers.json", "tensorboard", "wandb")
DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\.|$)", re.IGNORECASE)  # Windows writes to these, whatever the suffix


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a whole file, or leaves the one that is there."""
    with replacing(path) as beside:
        beside.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))


def name_problem(name: str, input: str) -> str | None:
    """The line about a name that is no plain file name which every system takes; None where it is one."""
    if DEVICES.match(name):
        return f'input "{input}": found {name!r}, which is a device on Windows; accepted: another name'
    if re.fullmatch(r"[\w][\w .-]{0,99}", name) and not name.endswith((".", " ")):
        return None
    return f'input "{input}": found {name!r}, accepted: letters, digits, "_", "-", "." and spaces, at most 100'


def checked_name(name: str, input: str = "run_name") -> str:
    """The name. Raises `RunError` where `name_problem` names one: it may have come over a link, which no one checked before."""
    if line := name_problem(name, input):
        raise RunError(line)
    return name


class RunFolder:
    """`DIR/NAME`. `state` is "running", "stopped" or "finished"; `iterations` how many the state covers."""

    def __init__(self, path: Path):
        self.path = path
        self.images, self.pictures, self.checkpoints, self.lora, self.live = (path / n for n in ("images", "pictures", "checkpoints", "lora", "live"))
        self.best = self.checkpoints / "best"
        self.metrics, self.watch = path / "metrics.jsonl", path / "watch.jsonl"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def record(self) -> dict[str, Any]:
        """run.json, or an empty dictionary where there is none."""
        try:
            return json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError:
            raise RunError(f"{self.path / 'run.json'} is damaged; choose another \"run_name\", or delete that folder") from None

    def write_record(self, **changes: Any) -> None:
        before = self.record
        record = {**before, **changes}
        if record.get("state") != "running":
            record.pop("process", None)
        if record != before:  # the file's time is that of the run's last change, which its report tells
            write_atomically(self.path / "run.json", json.dumps(record, indent=2) + "\n")

    def write_running(self, **changes: Any) -> None:
        """The same, for a run that this process trains from now on."""
        since = datetime.datetime.now(datetime.timezone.utc).isoformat(sep=" ", timespec="seconds")
        self.write_record(state="running", process={"pid": os.getpid(), "host": platform.node(), "since": since}, **changes)

    def add_evaluations(self, node_id: str, found: dict[str, Any], nodes: Collection[str]) -> None:
        """Writes an Evaluate node's figures, by reward, into summary.json, in place of what it wrote before.

        Where several evaluate one reward, the second by node id is clip_score_2, in whatever order they ran; what a node wrote that is no more
        in the workflow is dropped (`nodes` are the workflow's). "evaluated_by" names each node's rewards.
        """
        from ..rewards import distinct

        path = self.path / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        former = iter(summary.get("evaluations", {}).values())  # in the order of "evaluated_by"
        figures = {node: {reward: next(former) for reward in rewards} for node, rewards in summary.get("evaluated_by", {}).items()}
        figures = {node: values for node, values in figures.items() if node in nodes}
        figures[node_id] = found
        summary["evaluations"], summary["evaluated_by"] = {}, {}
        for node in sorted(figures, key=lambda node: [(len(part), part) for part in node.split(":")]):
            summary["evaluated_by"][node] = list(figures[node])
            for reward, values in figures[node].items():
                summary["evaluations"][distinct(reward, summary["evaluations"])] = values
        write_atomically(path, json.dumps(summary, indent=2) + "\n")

    def note_out_of_memory(self, micro_batch: int) -> None:
        """Remembers, until the run starts over, that memory did not suffice for a micro-batch of this size. Any process may tell it."""
        with replacing(self._out_of_memory, f".{os.getpid()}") as beside:
            beside.write_text(f"{micro_batch}\n", encoding="utf-8")

    @property
    def _out_of_memory(self) -> Path:
        return self.live / "out_of_memory"

    def fitting(self, micro_batch: int) -> int:
        """This micro-batch, or half of the one that memory did not suffice for where that is smaller."""
        try:
            return min(micro_batch, max(1, int(self._out_of_memory.read_text(encoding="utf-8")) // 2))
        except (OSError, ValueError):
            return micro_batch

    def create(self, fingerprint: str, micro_batch: int) -> None:
        """Makes the folder afresh, and writes the workflow as given and as executed, where the host knows them."""
        self._delete(all_but="run.json")  # until the rest is gone it stays the former run: one killed here is known for a run
        (self.path / "run.json").unlink(missing_ok=True)
        self.write_running(fingerprint=fingerprint, micro_batch=micro_batch, iterations=0, version=__version__)
        if host().workflow_source:
            write_atomically(self.path / "workflow.json", host().workflow_source)
        if host().prompt:
            write_atomically(self.path / "prompt.json", json.dumps(host().prompt, indent=1) + "\n")

    def discard(self) -> None:
        """Deletes a run that came to nothing, and the folder, unless it holds what no run writes. Of this process's lock alone."""
        if all(path.name in WRITTEN for path in self.path.iterdir()):
            with contextlib.suppress(OSError):  # what cannot be deleted is left, as a stopped run
                self._delete(all_but="run.json")
                (self.path / "run.json").unlink(missing_ok=True)
                self.remove_lock()

    def remove_lock(self) -> None:
        """Deletes the lock's file, and the folders around it that hold nothing else."""
        with contextlib.suppress(OSError):  # Windows deletes no open file
            lock.path_of(self.path).unlink()
            self.live.rmdir()
            self.path.rmdir()

    def _delete(self, all_but: str) -> None:
        """Deletes the folder's content, the lock excepted. Raises `OSError` for what cannot be deleted."""
        kept = (lock.path_of(self.path), self.path / all_but)
        for path in [*_content(self.live), *_content(self.path)]:
            if path in kept or path == self.live:
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _content(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _is_free(path: Path) -> bool:
    """Whether a run may start here: nothing is there, or what a process left that was killed before it had written anything."""
    if not path.exists():
        return True
    return lock.path_of(path).is_file() and not [p for p in (*_content(path / "live"), *_content(path)) if p not in (path / "live", lock.path_of(path))] and not lock.held(path)


def _is_stored(name: str) -> bool:
    """Whether a storage that outlives this machine has a run of this name."""
    return host().storage is not None and host().storage.has(name)


def claim(name: str, fingerprint: str, iterations: int, micro_batch: int, on_existing: str) -> tuple[RunFolder, str, BaseFileLock]:
    """`choose`, and the chosen folder's lock: until it is released no other process trains there.

    Raises:
        RunError: as `choose`, and where another process trains there.
    """
    while True:
        folder, action = choose(name, fingerprint, iterations, micro_batch, on_existing)
        before = folder.record
        held = lock.take(folder.path)
        if held is not None:
            if folder.record == before:
                return folder, action, held
            held.release()  # its process has just ended; what it left decides
        elif not (action == "start" and on_existing == "new"):  # a new run that lost a race takes the next free name
            raise _in_use(folder)


def _in_use(folder: RunFolder) -> RunError:
    who = folder.record.get("process")
    by = f"process {who['pid']} on {who['host']} trains it since {who['since']}" if who else "another process has opened it"
    return RunError(f'run {folder.name!r} in {folder.path} is in use: {by}; accepted: to wait until it has ended, or another "run_name"')


def choose(name: str, fingerprint: str, iterations: int, micro_batch: int, on_existing: str) -> tuple[RunFolder, str]:
    """The folder for a run, and what to do there: "start", "resume" or "reopen" (it is finished; nothing is to be done).

    new: a finished, unchanged run is reopened; any other gets the next free name. resume: goes on, or is reopened when
    finished; another micro_batch is let through there, and reported. restart: `create` deletes the folder's former content.
    micro_batch: 0 stands for the run's own, which was found by trial.

    Raises:
        RunError: resume of a run whose workflow has changed, or that has gone further than `iterations`; restart or resume in
            a folder that is not a run's.
    """
    folder = RunFolder(host().output_folder / checked_name(name))
    if host().storage is not None:
        host().storage.fetch(name, on_existing)
    record = folder.record
    done = record.get("iterations", 0)
    finished = record.get("state") == "finished" and done == iterations
    unchanged = record.get("fingerprint") == fingerprint
    if _is_free(folder.path) and not (on_existing == "new" and _is_stored(name)):
        return folder, "start"
    if on_existing == "new":
        same = finished and unchanged and micro_batch in (0, record.get("micro_batch"))
        return (folder, "reopen") if same else (_next_free(folder.path), "start")
    if not record:
        if lock.held(folder.path):
            raise _in_use(folder)
        raise RunError(f'{folder.path} exists and is not a run of this program; choose another "run_name"')
    if on_existing == "restart":
        return folder, "start"
    if not unchanged:
        raise RunError(f'run {name!r} in {folder.path} was made by another workflow{_difference(folder)}; '
                       'set "on_existing" to new or restart, or choose another "run_name"')
    if done > iterations:
        raise RunError(f'input "iterations": found {iterations}, and run {name!r} in {folder.path} has already done {done}; '
                       'accepted to resume: as many or more')
    return folder, "reopen" if finished else "resume"


def _next_free(path: Path) -> RunFolder:
    number = 2
    while not _is_free(candidate := path.with_name(f"{path.name}-{number}")) or _is_stored(candidate.name):
        number += 1
    return RunFolder(candidate)


def _difference(folder: RunFolder) -> str:
    """What changed since, by node and input, as far as the stored prompt tells."""
    now, path = host().prompt, folder.path / "prompt.json"
    if not now or not path.is_file():
        return ""
    before, found = json.loads(path.read_text(encoding="utf-8")), []
    for node_id in before.keys() & now.keys():
        old, new = before[node_id]["inputs"], now[node_id]["inputs"]
        title = now[node_id].get("_meta", {}).get("title", now[node_id]["class_type"])
        found += [f"{title}.{k} was {old.get(k)!r} and is {new.get(k)!r}"
                  for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in MAY_CHANGE]
    found += [f"node {i} was added or removed" for i in sorted(before.keys() ^ now.keys())]
    return f" ({'; '.join(found[:4])})" if found else " (its prompts have changed)"
