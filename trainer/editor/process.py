"""The worker process as the editor sees it: started when first needed, and anew after it died."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..session import Options
from . import worker


class Worker:
    """`on_event(name, data)` is called in the event loop's thread; "died" with a `reason` when the process ended unasked.

    `previews` is where the worker puts preview pictures.
    """

    def __init__(self, options: Options, previews: Path, on_event: Callable[[str, dict[str, Any]], None]):
        self._options, self._previews, self._on_event = options, previews, on_event
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Any = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def send(self, order: str, data: Any = None) -> None:
        """Gives an order; to no process at all it is nothing, unless it is a job."""
        if self._process is None and order == "job":
            self._start()
        if self._process is not None:
            with contextlib.suppress(OSError):  # it died just now; the thread that listens says so
                self._connection.send((order, data))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def close(self) -> None:
        """Ends the process: it stops what it does, keeps what was trained, and leaves. Cancelled, it kills instead."""
        self.send("leave")
        process, self._process = self._process, None
        while process is not None and process.exitcode is None:
            try:
                await asyncio.to_thread(process.join, 0.2)
            except asyncio.CancelledError:
                process.kill()
                raise

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # torch and forked threads do not go together
        ours, theirs = context.Pipe()
        self._process = context.Process(target=worker.main, args=(self._options, self._previews, theirs), name="dancegrpo worker")
        self._process.start()
        theirs.close()  # so that its end is noticed here
        self._connection = ours
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(loop, self._process, ours), daemon=True).start()

    def _listen(self, loop: asyncio.AbstractEventLoop, process: Any, connection: Any) -> None:
        def tell(name: str, data: dict[str, Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
                loop.call_soon_threadsafe(self._received, process, name, data)

        with contextlib.suppress(EOFError, OSError):
            while True:
                tell(*connection.recv())
        process.join()
        tell("died", {"reason": _reason(process.exitcode)})

    def _received(self, process: Any, name: str, data: dict[str, Any]) -> None:
        if process is self._process:  # not one that was closed
            if name == "died":
                self._process = None
            self._on_event(name, data)


def _reason(exitcode: int | None) -> str:
    if exitcode is None:  # another thread, which closes the editor, was told the status in this one's place
        return "the training process ended"
    if exitcode >= 0:
        return f"the training process ended with status {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    hint = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return f"the training process was killed by {name}{hint}"
