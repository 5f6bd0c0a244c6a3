"""The editor's parts, put together: what every route works with."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from comfy_dancegrpo.workflow.read import SavedWorkflow

from ..hosts import ProgramHost
from ..session import Options, check, make_host
from .hub import Hub
from .jobs import Jobs
from .log import Log
from .process import Worker

PACK = "comfy_dancegrpo"  # our pack's name in URLs, as a ComfyUI that has it as a custom node uses it
MOST_UPLOAD = 200 * 1024**2  # bytes of a picture


class Editor:
    """Nodes, folders, jobs and pages of one running editor. Close it when done: the worker and the previews go with it.

    `opened` is the workflow that the page begins with, with its name, where one was given. `jobs`: options of `Jobs`.
    """

    def __init__(self, options: Options, opened: tuple[str, SavedWorkflow] | None = None, **jobs: Any):
        self.opened = opened
        self.host, self.nodes = make_host(options, ProgramHost)
        if self.nodes.lent:
            self.host.input_folder.mkdir(parents=True, exist_ok=True)  # ComfyUI's own nodes take it for granted
        self.output = options.output
        self.user = options.output / "user"
        self.previews = Path(tempfile.mkdtemp(prefix="dancegrpo-"))
        self.frontend = frontend_folder()
        self.features = {"supports_preview_metadata": False, "max_upload_size": MOST_UPLOAD, "show_signin_button": False, "assets": False,
                         "node_replacements": False}
        self.hub = Hub(self.features)
        self.log = Log(self.hub.send)
        self.jobs = Jobs(lambda on_event: Worker(_absolute(options), self.previews, on_event), self.hub.send, self.log.say, **jobs)

    @property
    def folders(self) -> dict[str, Path]:
        """The folders that /view and uploads name."""
        return {"output": self.output, "input": self.host.input_folder, "temp": self.previews}

    def output_nodes(self, prompt: dict[str, Any]) -> list[str]:
        classes = {n: self.nodes.registry.get(str(node.get("class_type"))) for n, node in prompt.items() if isinstance(node, dict)}
        return [n for n, cls in classes.items() if getattr(cls, "OUTPUT_NODE", False) is True]

    def check(self, prompt: dict[str, Any]) -> None:
        """Brings the prompt's values to their types. Raises WorkflowError with every problem."""
        check(prompt, self.nodes.registry)

    async def close(self) -> None:
        try:
            await self.jobs.close()
        finally:
            self.hub.close()
            shutil.rmtree(self.previews, ignore_errors=True)


def frontend_folder() -> Path:
    """The frontend's static files, of the package that the extra installs."""
    return Path(importlib.util.find_spec("comfyui_frontend_package").origin).parent / "static"  # not imported: it reads its own metadata


def _absolute(options: Options) -> Options:
    """The same, for a process that may be started from another folder."""
    paths = {name: Path(os.path.abspath(value)) for name, value in vars(options).items() if isinstance(value, Path)}
    return Options(**{**vars(options), **paths})
