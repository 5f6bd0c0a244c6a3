"""The run folder: what one training leaves on disk.

    workflow.json   the workflow as given            metrics.jsonl  a line per iteration
    prompt.json     the workflow as executed         summary.json   evaluations
    run.json        fingerprint and state            images/  checkpoints/  lora/  live/
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from .. import __version__
from ..atomic import replacing
from ..errors import RunError
from ..workflow.host import host

ON_EXISTING = ("new", "resume", "restart")
MAY_CHANGE = ("run_name", "iterations", "checkpoint_every", "on_existing", "micro_batch")  # without it being another run
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
        self.images, self.checkpoints, self.lora, self.live = (path / name for name in ("images", "checkpoints", "lora", "live"))
        self.metrics = path / "metrics.jsonl"

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
        write_atomically(self.path / "run.json", json.dumps({**self.record, **changes}, indent=2) + "\n")

    def add_to_summary(self, section: str, key: str, value: Any) -> None:
        path = self.path / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        summary.setdefault(section, {})[key] = value
        write_atomically(path, json.dumps(summary, indent=2) + "\n")

    def create(self, fingerprint: str, micro_batch: int) -> None:
        """Makes the folder afresh, and writes the workflow as given and as executed, where the host knows them."""
        if self.path.exists():
            aside = self.path.with_name(self.path.name + ".replaced")
            shutil.rmtree(aside, ignore_errors=True)
            self.path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        # first, so that a run killed here is known for a run when it is resumed
        self.write_record(fingerprint=fingerprint, micro_batch=micro_batch, state="running", iterations=0, version=__version__)
        if host().workflow_source:
            write_atomically(self.path / "workflow.json", host().workflow_source)
        if host().prompt:
            write_atomically(self.path / "prompt.json", json.dumps(host().prompt, indent=1) + "\n")


def choose(name: str, fingerprint: str, iterations: int, micro_batch: int, on_existing: str) -> tuple[RunFolder, str]:
    """The folder for a run, and what to do there: "start", "resume" or "reopen" (it is finished; nothing is to be done).

    new: a finished, unchanged run is reopened; any other gets the next free name. resume: goes on, or is reopened when
    finished; another micro_batch is let through there, and reported. restart: `create` deletes the folder's former content.

    Raises:
        RunError: resume of a run whose workflow has changed, or that has gone further than `iterations`; restart or resume in
            a folder that is not a run's.
    """
    folder = RunFolder(host().output_folder / checked_name(name))
    record = folder.record
    done = record.get("iterations", 0)
    finished = record.get("state") == "finished" and done == iterations
    unchanged = record.get("fingerprint") == fingerprint
    if not folder.path.exists():
        return folder, "start"
    if on_existing == "new":
        same = finished and unchanged and record.get("micro_batch") == micro_batch
        return (folder, "reopen") if same else (_next_free(folder.path), "start")
    if not record:
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
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
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
