"""The worker process: runs jobs one after another, keeps loaded models between them, and tells the editor what happens.

It tells events, `(name, data)`: ComfyUI's WebSocket messages without the prompt's id, and of our own "run" (how far a run is),
"said" (a line), "devices" and "ended" (`{"state", "data"}`, a job's last). It takes `("job", {...})`, `("interrupt", None)`,
`("free", None)` and `("leave", None)`, as which it takes a broken connection: it stops, keeps what was trained, and ends.
"""

from __future__ import annotations

import json
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from comfy_dancegrpo.errors import Interrupted, is_stop
from comfy_dancegrpo.workflow.execute import execute
from comfy_dancegrpo.workflow.host import Previews, use
from comfy_dancegrpo.workflow.problems import node_label

from ..hosts import ProgramHost
from ..session import Options, make_host
from .loaders import Loaders

_BETWEEN = 0.05  # seconds between two progress messages, at least


def main(options: Options, previews: Path, connection: Connection) -> None:
    """The process's own program, until the connection breaks. `previews` is where preview pictures go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the editor decides what becomes of the job
    host, _ = make_host(options, WorkerHost)
    loaders = Loaders(host.registry)
    host.registry, host.options = loaders.registry, options
    host.show_previews_in(previews)
    lock = threading.Lock()  # nodes may call from threads of their own

    def tell(event: str, data: dict[str, Any]) -> None:
        try:
            with lock:
                connection.send((event, data))
        except OSError:  # the editor is gone
            host.interrupt()

    host.tell = tell
    orders: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, host, orders), daemon=True).start()
    with use(host):
        while (order := orders.get())[0] != "leave":
            if order[0] == "free":
                loaders.clear()
            else:
                state, data = _run(order[1], host, loaders)
                tell("ended", {"state": state, "data": data})


def _listen(connection: Connection, host: WorkerHost, orders: queue.SimpleQueue) -> None:
    order = ("", None)
    while order[0] != "leave":
        try:
            order = connection.recv()
        except (EOFError, OSError):
            order = ("leave", None)
        if order[0] in ("interrupt", "leave"):
            host.interrupt()
        if order[0] == "job":
            host.let_run()  # here, so that an interrupt sent after the job is never lost
        if order[0] != "interrupt":
            orders.put(order)


def _run(job: dict[str, Any], host: WorkerHost, loaders: Loaders) -> tuple[str, dict[str, Any]]:
    """Runs one job. Its state ("success", "interrupted", "error") and what ComfyUI's message about it holds."""
    host.begin(job)
    try:
        host.tell("execution_cached", {"nodes": loaders.retain(job["prompt"])})
        execute(job["prompt"], host.registry, outputs=job["outputs"], extra_pnginfo=job["extra_pnginfo"])
        host.leave_node()
        return "success", {}
    except (Exception, SystemExit) as error:
        if is_stop(error):
            return "interrupted", host.where()
        loaders.clear()  # whatever went wrong, the next job starts from files
        return "error", _fault(error, job["prompt"], host)


def _fault(error: BaseException, prompt: dict[str, Any], host: WorkerHost) -> dict[str, Any]:
    said = str(error).strip() or type(error).__name__
    named = [node_id for node_id in prompt if said.startswith(node_label(node_id, prompt))]
    where = host.where(named[0] if named else None)
    if host.run_folder is not None:
        said += f'; what was trained is kept in {host.run_folder}: Loop Start\'s "on_existing" resume goes on from there'
    cause = error.__cause__
    trace = traceback.format_exception(type(cause), cause, cause.__traceback__) if cause is not None else []
    return {**where, "exception_message": said, "exception_type": type(cause or error).__name__, "traceback": trace}


class WorkerHost(ProgramHost):
    """Tells the editor; `begin` makes it ready for a job."""

    tell: Callable[[str, dict[str, Any]], None]
    options: Options

    def __init__(self, *options: Any):
        super().__init__(*options)
        self._interrupted = threading.Event()
        self._forget()

    def begin(self, job: dict[str, Any]) -> None:
        self._forget()
        self.prompt, self.extra_pnginfo = job["prompt"], job["extra_pnginfo"]
        workflow = (self.extra_pnginfo or {}).get("workflow") or self.prompt
        self.workflow_source = (json.dumps(workflow, indent=1, ensure_ascii=False) + "\n").encode()
        self.tell("devices", {"devices": _devices()})

    def _forget(self) -> None:
        self.run_folder = None
        self._node = self._loop = None
        self._states: dict[str, dict[str, Any]] = {}
        self._previews = Previews()
        self._told = 0.0

    # -- interrupts, from another thread ------------------------------------------------------------------------------
    def let_run(self) -> None:
        self._interrupted.clear()
        self._interrupt_lent(False)

    def interrupt(self) -> None:
        self._interrupted.set()
        self._interrupt_lent(True)

    @staticmethod
    def _interrupt_lent(value: bool) -> None:
        if "comfy.model_management" in sys.modules:
            sys.modules["comfy.model_management"].interrupt_current_processing(value)

    def check_interrupt(self) -> None:
        if self._interrupted.is_set():
            raise Interrupted("stopped")

    def trainer(self, classes: Collection[type]) -> list[str]:
        return [*self.options.words("output", "input", "models", "extra_model_paths", "comfyui", "allow_host"), "--previews", str(self.preview_folder)]

    # -- told by the engine -----------------------------------------------------------------------------------------
    def node_started(self, node_id: str, class_type: str, title: str) -> None:
        self.leave_node()
        self._node = node_id
        self._states[node_id] = {"value": 0, "max": 1, "state": "running"}
        self.tell("executing", {"node": node_id, "display_node": node_id})
        self._tell_states()

    def leave_node(self) -> None:
        """The node that ran is done; Loop End is not, as long as its loop runs."""
        if self._node is not None and self._node != self._loop:
            self._states[self._node].update(state="finished", value=self._states[self._node]["max"])

    def node_output(self, node_id: str, ui: dict[str, Any]) -> None:
        ui = json.loads(json.dumps(ui, default=str))
        self.tell("executed", {"node": node_id, "display_node": node_id, "output": ui})
        self._previews.shown(self.preview_folder, node_id, ui)

    def progress(self, value: float, total: float, text: str = "") -> None:
        """Of iterations (with text) on Loop End, of micro-batches on the node that runs."""
        node_id = self._loop if text and self._loop else self._node
        if node_id is None:
            return
        self._states[node_id].update(value=value, max=total)
        if text or value >= total or time.monotonic() - self._told > _BETWEEN:
            self._told = time.monotonic()
            self.tell("progress", {"value": value, "max": total, "node": node_id})
            self._tell_states()
        if text:
            self.say(f"{value:g}/{total:g} {text}")

    def say(self, line: str) -> None:
        self.tell("said", {"line": line})

    def run_started(self, folder: Path, node_id: str) -> None:
        super().run_started(folder, node_id)
        self._loop = node_id

    def run_moved(self, folder: Path, iteration: int, iterations: int) -> None:
        self._tell_run(folder, "running", iteration=iteration, iterations=iterations)

    def run_ended(self, folder: Path, state: str) -> None:
        super().run_ended(folder, state)
        self._tell_run(folder, state)
        self._loop = None

    def where(self, node_id: str | None = None) -> dict[str, Any]:
        """The node that ran last, or this one, as ComfyUI's messages name it; and those that are done."""
        node_id = node_id or self._node
        node_type = self.prompt[node_id]["class_type"] if node_id in self.prompt else ""
        done = [other for other, state in self._states.items() if state["state"] == "finished"]
        return {"node_id": node_id, "node_type": node_type, "executed": done}

    def _tell_run(self, folder: Path, state: str, **how_far: int) -> None:
        self.tell("run", {"run": folder.name, "node": self._loop, "state": state, **how_far})

    def _tell_states(self) -> None:
        self.tell("progress_state", {"nodes": {node_id: {**state, "node_id": node_id, "display_node_id": node_id, "parent_node_id": None,
                                                         "real_node_id": node_id} for node_id, state in self._states.items()}})


def _devices() -> list[dict[str, Any]]:
    """What torch may compute on, as ComfyUI's /system_stats lists it."""
    import torch

    if not torch.cuda.is_available():
        kind = "mps" if torch.backends.mps.is_available() else "cpu"
        return [{"name": kind, "type": kind, "index": 0, "vram_total": 0, "vram_free": 0, "torch_vram_total": 0, "torch_vram_free": 0}]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        reserved, used = torch.cuda.memory_reserved(index), torch.cuda.memory_allocated(index)
        found.append({"name": torch.cuda.get_device_name(index), "type": "cuda", "index": index, "vram_total": total, "vram_free": free,
                      "torch_vram_total": reserved, "torch_vram_free": reserved - used})
    return found
