"""The headless host: a progress bar on a terminal, plain lines elsewhere, both on stderr; and stopping when asked to."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_dancegrpo import processes, pulse
from comfy_dancegrpo.errors import Interrupted

from .hosts import ProgramHost

_TOLD_TWICE = 1.0  # seconds


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal; `exit_status` tells which."""

    def __init__(self, signum: int):
        super().__init__(signum)  # kept among its arguments, it can be sent to other processes
        self.exit_status = 128 + signum


class ConsoleHost(ProgramHost):
    """Shows a run on stderr. `files` is what output nodes saved."""

    def __init__(self, *options: Any):
        super().__init__(*options)
        self.files: dict[Path, None] = {}
        self._stopped_by: int | None = None
        self._stopped_at = 0.0
        self.shows = processes.is_first()
        self._display = _Silent() if not self.shows else _Bars() if sys.stderr.isatty() else _Lines()

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked to stop."""
        return self._stopped_by is not None

    def run_started(self, folder: Path, node_id: str) -> None:
        super().run_started(folder, node_id)
        pulse.tell(run=str(self.run_folder))

    def node_started(self, node_id: str, class_type: str, title: str) -> None:
        pulse.tell(node=title[:100])
        self._display.node(node_id, title)

    def node_output(self, node_id: str, ui: dict[str, Any]) -> None:
        for values in ui.values():
            for saved in values if isinstance(values, (list, tuple)) else ():
                if isinstance(saved, dict) and saved.get("type") == "output" and "filename" in saved:
                    self.files[self.output_folder / saved.get("subfolder", "") / saved["filename"]] = None

    def progress(self, value: float, total: float, text: str = "") -> None:
        self._display.progress(value, total, text)

    def say(self, line: str) -> None:
        self._display.say(line)

    def check_interrupt(self) -> None:
        pulse.tell()
        if processes.count() == 1:  # of many, none may leave while others wait for it
            self.check_together()

    def check_together(self) -> None:
        if self._stopped_by is not None:
            error = Interrupted("stopped")
            error.exit_status = 128 + self._stopped_by
            raise error

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs, a first SIGINT or SIGTERM asks to stop at the next micro-batch, a second stops at once.

        The second raises StoppedAtOnce, from wherever the program is. Of several processes each is told by its launcher, and often by whoever stopped
        that one too (Slurm and systemd tell all processes of a job): what comes so soon after the first is the first.
        """

        def stop(signum: int, frame: Any) -> None:
            if self._stopped_by is not None:
                if time.monotonic() < self._stopped_at + _TOLD_TWICE and processes.count() > 1:
                    return
                raise StoppedAtOnce(signum)
            self._stopped_by, self._stopped_at = signum, time.monotonic()
            if self.shows:  # not print: the signal may have come in the middle of one
                os.write(2, b"\nstopping after this micro-batch; once more stops at once\n")

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            self._display.close()


class _Lines:
    """Plain lines: each node's title once, a line for each progress that has something to say."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def node(self, node_id: str, title: str) -> None:
        if node_id not in self._seen:
            self._seen.add(node_id)
            self.say(title)

    def progress(self, value: float, total: float, text: str) -> None:
        if text:
            self.say(f"{value:g}/{total:g} {text}")

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class _Silent:
    """In all processes but the first."""

    def node(self, node_id: str, title: str) -> None: ...

    def progress(self, value: float, total: float, text: str) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


class _Bars:
    """A bar for progress that has something to say (iterations), and one below it for progress that has not (micro-batches)."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[text]}", markup=False))
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._tasks = [self._progress.add_task("", total=None, visible=False, text="") for _ in range(2)]
        self._title = ""

    def node(self, node_id: str, title: str) -> None:
        self._title = title
        self._progress.start()
        self._progress.update(self._tasks[1], description=title, total=None, completed=0, visible=True)

    def progress(self, value: float, total: float, text: str) -> None:
        main = bool(text)
        self._progress.start()
        self._progress.update(self._tasks[0 if main else 1], description="" if main else self._title,
                              total=total, completed=value, visible=True, text=text)

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.update(self._tasks[1], visible=False)
        self._progress.stop()
