"""Jobs: the queue, the one that runs, and the history. All of it belongs to the event loop's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .process import Worker

MOST_WAITING = 100
_MOST_KEPT = 200  # jobs in the history
_GRACE = 10.0  # seconds that a worker has to notice an interrupt; after them a second one kills it
_FOR_ALL = {"dancegrpo.run"}  # messages that every page gets; the others go to the page that queued the job


@dataclass(eq=False)
class Job:
    """A job. `state` is ComfyUI's: pending, in_progress, completed, failed, cancelled; times are milliseconds since 1970."""

    id: str
    number: float
    prompt: dict[str, dict[str, Any]]
    extra_data: dict[str, Any]
    outputs: list[str] | None  # the output nodes to execute; None: all
    output_nodes: list[str]
    client_id: str | None
    created: int
    state: str = "pending"
    started: int | None = None
    ended: int | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    node: str | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    interrupted_at: float | None = None

    @property
    def extra_pnginfo(self) -> dict[str, Any] | None:
        found = self.extra_data.get("extra_pnginfo")
        return found if isinstance(found, dict) else None


def now() -> int:
    return int(time.time() * 1000)


class Jobs:
    """`send(event, data, client_id)` reaches the pages, `say(line)` the log. `worker` executes."""

    def __init__(self, worker: Callable[[Callable[[str, dict[str, Any]], None]], Worker], send: Callable[..., None],
                 say: Callable[[str], None], grace: float = _GRACE):
        self.worker = worker(self._on_event)
        self._send, self._say, self._grace = send, say, grace
        self.waiting: list[Job] = []
        self.running: Job | None = None
        self.history: dict[str, Job] = {}
        self.devices: list[dict[str, Any]] = []
        self.run: dict[str, Any] | None = None  # what GET /dancegrpo/runs calls active
        self._number = 0
        self._idle = asyncio.Event()
        self._idle.set()

    # -- the queue --------------------------------------------------------------------------------------------------
    @property
    def remaining(self) -> int:
        return len(self.waiting) + (self.running is not None)

    def status(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.remaining}}

    def number(self, front: bool) -> float:
        """The next place in the queue, at its front or its end."""
        self._number += 1
        return float(-self._number if front else self._number)

    def put(self, job: Job) -> None:
        self.waiting.append(job)
        self.waiting.sort(key=lambda waiting: waiting.number)  # stable: equal numbers in the order in which they came
        self._changed()
        self._next()

    def find(self, job_id: str) -> Job | None:
        return next((job for job in self.all() if job.id == job_id), None)

    def all(self) -> list[Job]:
        """What runs, what waits, and then the history, the latest first."""
        return [*([self.running] if self.running else []), *self.waiting, *reversed(self.history.values())]

    def cancel(self, job_id: str) -> None:
        """Takes a waiting job out of the queue."""
        for job in [job for job in self.waiting if job.id == job_id]:
            self.waiting.remove(job)
            self._keep(job, "cancelled")
        self._changed()

    def clear(self) -> None:
        for job in list(self.waiting):
            self.cancel(job.id)

    def interrupt(self, job_id: str | None = None) -> None:
        """Asks the running job to stop; asked again, of a worker that has not reacted for a while, kills the worker."""
        job = self.running
        if job is None or (job_id and job.id != job_id):
            return
        if job.interrupted_at is None:
            job.interrupted_at = time.monotonic()
            self.worker.send("interrupt")
        elif time.monotonic() - job.interrupted_at >= self._grace:
            self._say("the training process did not react; it is killed")
            self.worker.kill()

    def free(self) -> None:
        """Lets go of the loaded models, once the running job is done."""
        self.worker.send("free")

    def forget(self, job_id: str) -> None:
        self.history.pop(job_id, None)

    async def close(self) -> None:
        """Cancels what waits, stops what runs, and returns when the worker is gone; cancelled, it kills the worker."""
        self.clear()
        self.interrupt()
        try:
            await self._idle.wait()
        except asyncio.CancelledError:
            self.worker.kill()
            raise
        finally:
            await self.worker.close()

    # -- running ----------------------------------------------------------------------------------------------------
    def _next(self) -> None:
        if self.running is not None or not self.waiting:
            return
        job = self.running = self.waiting.pop(0)
        job.state, job.started = "in_progress", now()
        self._idle.clear()
        self._message(job, "execution_start", {})
        self.worker.send("job", {"prompt": job.prompt, "outputs": job.outputs, "extra_pnginfo": job.extra_pnginfo})
        self._changed()

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        """What the worker told."""
        job = self.running
        if name == "said":
            self._say(data["line"])
        elif name == "devices":
            self.devices = data["devices"]
        elif job is None:  # of a job that is over: a worker that died idle
            return
        elif name == "died":
            self._died(job, data["reason"])
        elif name == "ended":
            self._ended(job, data["state"], data["data"])
        elif name == "run":
            self._moved(job, data)
        else:
            if name == "executing":
                job.node = data["node"]
            elif name == "progress_state":
                job.progress = data["nodes"]
            elif name == "executed":
                job.results[data["node"]] = data["output"]
            self._message(job, name, data)

    def _moved(self, job: Job, data: dict[str, Any]) -> None:
        run = {**(self.run or {}), **data, "prompt_id": job.id}
        self._message(job, "dancegrpo.run", run)
        self.run = {key: value for key, value in run.items() if key != "state"} if data["state"] == "running" else None

    def _died(self, job: Job, reason: str) -> None:
        if job.interrupted_at is not None:
            self._ended(job, "interrupted", self._where(job))
            return
        said = f"{reason}; the next run starts a new one"
        if self.run is not None:
            said += f'. The last checkpoint of run "{self.run["run"]}" is kept: Loop Start\'s "on_existing" resume goes on from there'
        self._ended(job, "error", {**self._where(job), "exception_message": said, "exception_type": "WorkerDied", "traceback": []})

    @staticmethod
    def _where(job: Job) -> dict[str, Any]:
        node_id = job.node or next(iter(job.prompt))
        return {"node_id": node_id, "node_type": job.prompt[node_id]["class_type"],
                "executed": [n for n, state in job.progress.items() if state["state"] == "finished"]}

    def _ended(self, job: Job, state: str, data: dict[str, Any]) -> None:
        if self.run is not None:
            self._moved(job, {"run": self.run["run"], "node": self.run["node"], "state": "stopped"})
        if state == "success":
            self._message(job, "execution_success", {})
        elif state == "interrupted":
            self._message(job, "execution_interrupted", data)
        else:
            job.error = {**data, "prompt_id": job.id, "timestamp": now(), "current_inputs": {}, "current_outputs": []}
            self._message(job, "execution_error", job.error)
            self._say(data["exception_message"])
        self._message(job, "executing", {"node": None})
        self.running = None
        self._keep(job, {"success": "completed", "interrupted": "cancelled", "error": "failed"}[state])
        self._idle.set()
        self._changed()
        self._next()

    def _keep(self, job: Job, state: str) -> None:
        job.state, job.ended = state, now()
        self.history.pop(job.id, None)
        self.history[job.id] = job
        while len(self.history) > _MOST_KEPT:
            del self.history[next(iter(self.history))]

    def _message(self, job: Job, event: str, data: dict[str, Any]) -> None:
        data = {**data, "prompt_id": job.id}
        if event.startswith("execution_"):
            data.setdefault("timestamp", now())
            job.messages.append((event, data))
        self._send(event, data, None if event in _FOR_ALL else job.client_id)

    def _changed(self) -> None:
        self._send("status", {"status": self.status()})

    def greeting(self, client_id: str) -> list[tuple[str, dict[str, Any]]]:
        """What a page is told when it connects: the queue, and where its job is, should it be running."""
        told: list[tuple[str, dict[str, Any]]] = [("status", {"status": self.status(), "sid": client_id})]
        job = self.running
        if job is not None and job.client_id == client_id:
            told += job.messages
            told.append(("progress_state", {"prompt_id": job.id, "nodes": job.progress}))
            told.append(("executing", {"node": job.node, "display_node": job.node, "prompt_id": job.id}))
        return told
