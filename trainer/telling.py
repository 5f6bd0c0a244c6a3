"""The host of a trainer that a page has started (`comfy_dancegrpo.runs.child`): it shows nothing itself, and tells that process all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .console import ConsoleHost, _Silent


class TellingHost(ConsoleHost):
    """Tells what the page's own host would be told: lines of JSON on stdout."""

    def __init__(self, *options: Any):
        super().__init__(*options)
        self._display = _Silent()
        self._known: dict[str, Any] = {}

    def stand_behind(self, page: Path, previews: Path | None) -> None:
        """page: what the other process wrote of the whole workflow, of which this one was given the loop. previews: where previews go."""
        if previews is not None:
            self.show_previews_in(previews)
        self._known = json.loads(page.read_text(encoding="utf-8"))
        self.extra_pnginfo = self._known["extra_pnginfo"]

    def workflow_started(self, prompt: dict[str, dict], extra_pnginfo: dict[str, Any] | None) -> None:
        self.prompt, self.workflow_source = self._known["prompt"], self._known["source"].encode()

    def _tell(self, *told: Any) -> None:
        if self.shows:
            print(json.dumps(told, default=str), flush=True)

    def node_started(self, node_id: str, class_type: str, title: str) -> None:
        super().node_started(node_id, class_type, title)
        self._tell("node_started", node_id, class_type, title)

    def node_output(self, node_id: str, ui: dict[str, Any]) -> None:
        self._tell("node_output", node_id, ui)

    def progress(self, value: float, total: float, text: str = "") -> None:
        self._tell("progress", value, total, text)

    def say(self, line: str) -> None:
        self._tell("say", line)

    def run_started(self, folder: Path, node_id: str) -> None:
        super().run_started(folder, node_id)
        self._tell("run_started", os.path.abspath(folder), node_id)

    def run_moved(self, folder: Path, iteration: int, iterations: int) -> None:
        self._tell("run_moved", os.path.abspath(folder), iteration, iterations)

    def run_ended(self, folder: Path, state: str) -> None:
        super().run_ended(folder, state)
        self._tell("run_ended", os.path.abspath(folder), state)
