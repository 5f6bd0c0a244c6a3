"""The run folder: what one training leaves on disk.

    workflow.json   the workflow as given            metrics.jsonl  a line per iteration
    prompt.json     the workflow as executed         summary.json   evaluations
    run.json        fingerprint and state            images/  checkpoints/  lora/
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
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\.|$)", re.IGNORECASE)  # Windows writes to these, whatever the suffix


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a whole file, or leaves the one that is there."""
    with replacing(path) as beside:
        beside.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))


def name_problem(name: str, input: str) -> str | None:
    """The line about a name that is no plain file name which every system takes; None where it is one."""
    if _DEVICES.match(name):
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
        self.images, self.checkpoints, self.lora = path / "images", path / "checkpoints", path / "lora"
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

    def write_record(self, **changes: Any) -> None:
        write_atomically(self.path / "run.json", json.dumps({**self.record, **changes}, indent=2) + "\n")

    def add_to_summary(self, section: str, key: str, value: Any) -> None:
        path = self.path / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        summary.setdefault(section, {})[key] = value
        write_atomically(path, json.dumps(summary, indent=2) + "\n")

    def create(self, fingerprint: str) -> None:
        """Makes the folder and writes the workflow as given and as executed, where the host knows them."""
        # first, so that a run killed here is known for a run when it is resumed
        self.write_record(fingerprint=fingerprint, state="running", iterations=0, version=__version__)
        if host().workflow_source:
            write_atomically(self.path / "workflow.json", host().workflow_source)
        if host().prompt:
            write_atomically(self.path / "prompt.json", json.dumps(host().prompt, indent=1) + "\n")


def choose(name: str, fingerprint: str, iterations: int, on_existing: str) -> tuple[RunFolder, str]:
    """The folder for a run, and what to do there: "start", "resume" or "reopen" (it is finished; nothing is to be done).

    new: a finished, unchanged run is reopened; any other gets the next free name. resume: goes on, or is reopened when
    finished. restart: the folder's former content is deleted.

    Raises:
        RunError: resume of a run whose workflow has changed; restart or resume in a folder that is not a run's.
    """
    folder = RunFolder(host().output_folder / checked_name(name))
    record = folder.record
    finished = record.get("state") == "finished" and record.get("iterations") == iterations
    unchanged = record.get("fingerprint") == fingerprint
    if not folder.path.exists():
        return folder, "start"
    if on_existing == "new":
        return (folder, "reopen") if finished and unchanged else (_next_free(folder.path), "start")
    if not record:
        raise RunError(f'{folder.path} exists and is not a run of this program; choose another "run_name"')
    if on_existing == "restart":
        shutil.rmtree(folder.path)
        return folder, "start"
    if not unchanged:
        raise RunError(f'run {name!r} in {folder.path} was made by another workflow{_difference(folder)}; '
                       'set "on_existing" to new or restart, or choose another "run_name"')
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
                  for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in ("on_existing", "run_name")]
    found += [f"node {i} was added or removed" for i in sorted(before.keys() ^ now.keys())]
    return f" ({'; '.join(found[:4])})" if found else ""
