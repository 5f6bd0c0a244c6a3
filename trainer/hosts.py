"""What the program's hosts share, headless and in the editor's worker: model folders from the options, and classes that ComfyUI lent."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from comfy_dancegrpo.workflow.host import Host

from .paths import ModelPaths


class ProgramHost(Host):
    """A host made from the command line's options; `lent` are classes of ComfyUI, called under inference mode."""

    def __init__(self, registry: dict[str, type], output: Path, input: Path, paths: ModelPaths, lent: frozenset[type] = frozenset()):
        super().__init__(registry, output, input, paths.models)
        self.extra_pnginfo: dict[str, Any] | None = None
        self.paths, self._lent = paths, lent

    def model_folders(self, kind: str) -> list[Path]:
        return self.paths.folders(kind)

    def show_previews_in(self, folder: Path) -> None:
        """Where a page fetches previews from; nodes that ComfyUI lent write theirs there too."""
        self.preview_folder = folder
        if "folder_paths" in sys.modules:
            sys.modules["folder_paths"].set_temp_directory(str(folder))

    def around(self, node_class: type) -> contextlib.AbstractContextManager:
        if node_class not in self._lent:
            return super().around(node_class)
        import torch

        return torch.inference_mode()
