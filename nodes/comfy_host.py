"""The host inside ComfyUI: its folders, progress, previews and stop button. The one file of the nodes that imports ComfyUI."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import nodes as comfy_nodes
import torch
from comfy_dancegrpo.workflow import host
from comfy_execution.utils import get_executing_context
from server import PromptServer


class ComfyHost(host.Host):
    """Active from the moment that ComfyUI loads the pack."""

    def __init__(self) -> None:
        super().__init__(comfy_nodes.NODE_CLASS_MAPPINGS, models=folder_paths.models_dir)
        self.registry = comfy_nodes.NODE_CLASS_MAPPINGS  # not a copy: packs that load later are in it too
        self._previews: dict[str, list[list[Path]]] = {}
        for kind in ("diffusers", "reward_models"):
            if kind not in folder_paths.folder_names_and_paths:
                folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))

    @property
    def output_folder(self) -> Path:
        return Path(folder_paths.get_output_directory())

    @output_folder.setter
    def output_folder(self, value: Any) -> None:
        """ComfyUI's own setting counts."""

    @property
    def input_folder(self) -> Path:
        return Path(folder_paths.get_input_directory())

    @input_folder.setter
    def input_folder(self, value: Any) -> None:
        """ComfyUI's own setting counts."""

    def device(self) -> Any:
        return comfy.model_management.get_torch_device()

    def model_folders(self, kind: str) -> list[Path]:
        try:
            return [Path(p) for p in folder_paths.get_folder_paths(kind)]
        except KeyError:
            return super().model_folders(kind)

    def workflow_started(self, prompt: dict[str, dict], extra_pnginfo: dict[str, Any] | None) -> None:
        workflow = (extra_pnginfo or {}).get("workflow", prompt)
        self.prompt, self.workflow_source = prompt, json.dumps(workflow).encode()

    def node_started(self, node_id: str, class_type: str, title: str) -> None:
        self._send("executing", {"node": node_id, "display_node": node_id})

    def node_output(self, node_id: str, ui: dict[str, Any]) -> None:
        self._send("executed", {"node": node_id, "display_node": node_id, "output": ui})
        self._forget_previews(node_id, ui)

    def progress(self, value: float, total: float, text: str = "") -> None:
        comfy.utils.ProgressBar(total).update_absolute(value)  # raises when the stop button was pressed
        if text:
            logging.info("DanceGRPO %g/%g %s", value, total, text)

    def say(self, line: str) -> None:
        logging.info("DanceGRPO: %s", line)

    def check_interrupt(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def around(self, node_class: type) -> contextlib.AbstractContextManager:
        ours = node_class.__module__.startswith("comfy_dancegrpo.")
        return contextlib.nullcontext() if ours else torch.inference_mode()

    def _forget_previews(self, node_id: str, ui: dict[str, Any]) -> None:
        """Deletes what a preview in the body wrote two iterations ago: ComfyUI empties its temp folder only at its start."""
        temp = Path(folder_paths.get_temp_directory())
        made = [temp / i.get("subfolder", "") / i["filename"] for i in ui.get("images", ()) if isinstance(i, dict) and i.get("type") == "temp"]
        former = self._previews.setdefault(node_id, [])
        former.append(made)
        for path in former.pop(0) if len(former) > 2 else ():
            path.unlink(missing_ok=True)

    @staticmethod
    def _send(event: str, data: dict[str, Any]) -> None:
        server, context = PromptServer.instance, get_executing_context()
        if server.client_id is not None and context is not None:
            server.send_sync(event, {**data, "prompt_id": context.prompt_id}, server.client_id)


def activate() -> None:
    """Makes ComfyUI the process's host; a program that lends ComfyUI's nodes puts its own host above it."""
    host._active.append(ComfyHost())
