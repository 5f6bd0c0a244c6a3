"""A loop that several processes train while a page runs the rest: the headless trainer, started on the loop's part of the workflow.

The trainer tells on its stdout, a line of JSON each, what a host is told where the loop runs in place: `[name, *arguments]` of a method of `Host`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import comfy_dancegrpo

from .. import processes
from ..errors import RunError, is_stop
from ..workflow.graph import Prompt, ancestors
from ..workflow.host import host
from ..workflow.loop import LoopBody
from . import checkpoints, live, metrics
from .folder import RunFolder
from .watch import Rule, WatchLog

if TYPE_CHECKING:
    from ..lora.adapter import LoraSnapshot
    from ..lora.full import FullSnapshot
    from ..policies.base import Policy
    from ..prompts import PromptList
    from .session import LoopSettings, RunRecord

TELLS = ("node_started", "node_output", "progress", "say", "run_started", "run_moved", "run_ended")
_OF_A_RUN = ("run_started", "run_moved", "run_ended")  # their first argument is its folder
_LOOK = 0.1  # seconds between two looks at the stop button


def part(prompt: Prompt, body: LoopBody, count: int) -> Prompt:
    """The loop: its end, its body with what shows or saves there, and all that they come from. The trainer need not know the other nodes."""
    inside = {body.end_id, *body.nodes}
    wanted, start = {*inside, *ancestors(prompt, inside)}, prompt[body.start_id]
    told = {**start, "inputs": {**start["inputs"], "processes": count}}  # the number itself, where a link leads there
    return {node_id: told if node_id == body.start_id else node for node_id, node in prompt.items() if node_id in wanted}


def train(body: LoopBody, count: int, words: Sequence[str], extra_pnginfo: dict[str, Any] | None = None) -> RunFolder:
    """Trains a loop of the host's prompt in `count` processes, and passes on what they tell; returns the run's folder.

    words: of `dancegrpo run`, from `Host.trainer`. Raises `RunError` with the line by which they failed, and what the host's stop button raises once
    they have saved and left.
    """
    with tempfile.TemporaryDirectory(prefix="dancegrpo-") as folder:
        workflow, page = Path(folder) / "workflow.json", Path(folder) / "page.json"
        workflow.write_text(json.dumps(part(host().prompt, body, count)), encoding="utf-8")
        known = {"prompt": host().prompt, "source": host().workflow_source.decode(), "extra_pnginfo": extra_pnginfo}
        page.write_text(json.dumps(known), encoding="utf-8")
        command = [sys.executable, "-m", "comfy_dancegrpo.trainer", "run", str(workflow), *words, "--tell", str(page)]
        host().say(f"{count} processes are started, which train this loop")
        child = subprocess.Popen(command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 encoding="utf-8", errors="replace", start_new_session=True)
        with _killed_at_last(child):
            return _follow(child)


def _environment() -> dict[str, str]:
    """By which a plain clone is found too, and the child knows whom it is to end with."""
    root = str(Path(comfy_dancegrpo.__file__).resolve().parent.parent)
    device = host().device()
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if device is not None and device.type == "cpu" else {}
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, **on_cpu, "PYTHONPATH": path, processes.LAUNCHER: str(os.getpid()), "PYTHONIOENCODING": "utf-8"}


@contextlib.contextmanager
def _killed_at_last(child: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        child.kill()  # the processes that it has started end with it; of one that has ended it is nothing
        child.wait()


def _follow(child: subprocess.Popen) -> RunFolder:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    verdict: list[str] = []
    out = threading.Thread(target=_read, args=(child.stdout, told.put), daemon=True)
    err = threading.Thread(target=_read, args=(child.stderr, lambda line: _stderr(line, verdict)), daemon=True)
    out.start()
    err.start()
    folder, stop = None, None
    while out.is_alive() or not told.empty():
        with contextlib.suppress(queue.Empty):
            folder = _pass_on(told.get(timeout=_LOOK), verdict) or folder
        if stop is None and (stop := _pressed()) is not None:
            _end(child, folder)
    err.join()
    status = child.wait()
    if status and (said := [line for line in verdict if line != "stopped"]):
        error = RunError("; ".join(said))
        error.labelled = said[0].startswith("node ")
        raise error
    if stop is not None:
        raise stop
    if status or folder is None:
        raise RunError(f"the processes that train ended with status {status}")
    return folder


def _pressed() -> Exception | None:
    """What the host raises where the user asks to stop."""
    try:
        host().check_interrupt()
    except Exception as error:
        if not is_stop(error):
            raise
        return error
    return None


def _end(child: subprocess.Popen, folder: RunFolder | None) -> None:
    if os.name == "nt" and folder is not None:  # a process that is told to end cannot save there: the run is, and ends after this iteration
        live.request_stop(folder.path)
    else:
        child.terminate()


def _read(stream: TextIO, take: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            take(line.rstrip("\n"))


def _stderr(line: str, verdict: list[str]) -> None:
    """What the trainer says went wrong is this process's error; anything else goes where it went."""
    if line.startswith("dancegrpo: "):
        verdict.append(line.removeprefix("dancegrpo: ").partition("; resume with: ")[0])
    else:
        print(line, file=sys.stderr, flush=True)


def _pass_on(line: str, verdict: list[str]) -> RunFolder | None:
    """Tells the host; gives the run's folder where the line names it."""
    try:
        name, *arguments = json.loads(line)
        if name not in TELLS:
            raise ValueError
    except (ValueError, TypeError):  # what a node printed
        host().say(line)
        return None
    folder = RunFolder(Path(arguments.pop(0))) if name in _OF_A_RUN else None
    if name == "run_started":
        verdict.clear()  # what went wrong before: the processes were started again, with half the micro-batch
    getattr(host(), name)(*([folder.path] if folder else []), *arguments)
    return folder


def outcome(policy: Policy, prompts: PromptList, settings: LoopSettings, folder: RunFolder,
            rule: Rule | None) -> tuple[LoraSnapshot | FullSnapshot, RunRecord]:
    """What Loop End gives, read from the run's folder; as `Session.snapshot` and `Session.record`. Raises `RunError` where nothing whole is there."""
    from ..grpo.learner import Learner
    from .session import RunRecord

    if settings.start_from is not None:
        settings = replace(settings, lora=settings.lora.starting_from(settings.start_from))
    watch = WatchLog(folder, rule)
    found = (watch.best_state() if watch.verdict else None) or checkpoints.newest(folder.checkpoints, folder.record.get("fingerprint", ""))
    if found is None:
        raise RunError(f"run {folder.name!r} in {folder.path} has no whole checkpoint")
    trained = settings.lora.attach(policy, settings.seed)
    try:
        plain = replace(settings.optimizer, name="adamw")  # which needs no GPU; it is not to step here
        learner = Learner(policy, trained.parameters, plain, folder.name)
        snapshot = trained.snapshot(learner.result(found[1]), found[0], learner.ema is not None, folder.path, prompts.prompts)
    finally:
        trained.remove()
    return snapshot, RunRecord(folder.path, tuple(metrics.read(folder.metrics)), tuple(watch.rows))
