"""`--comfyui PATH`: a ComfyUI folder lends its node classes, its own and its custom nodes', to graphs that need them."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow import host

from .paths import ModelPaths


def lend(root: Path, output: Path, input: Path, paths: ModelPaths) -> tuple[dict[str, type], dict[str, str]]:
    """ComfyUI's node classes and their display names; its folders become ours. Its API nodes, which call hosts, stay out.

    Imports torch and all of ComfyUI. Raises WorkflowError when `root` is not ComfyUI, or cannot be imported here.
    """
    if not (root / "nodes.py").is_file() or not (root / "comfy").is_dir():
        raise WorkflowError(f"--comfyui: {root}: not a ComfyUI folder (no nodes.py and comfy/ in it)")
    sys.path.insert(0, str(root.resolve()))
    active = list(host._active)
    try:
        return _import(output, input, paths)
    except (Exception, SystemExit) as error:  # whatever its packages raise where they do not fit together
        raise WorkflowError(f"--comfyui: {root}: cannot be imported here ({' '.join(str(error).split())}); its requirements are in "
                            f"{root / 'requirements.txt'}") from error
    finally:
        host._active[:] = active  # this pack may be in its custom_nodes, and would be the host of a ComfyUI that runs


def _import(output: Path, input: Path, paths: ModelPaths) -> tuple[dict[str, type], dict[str, str]]:
    importlib.import_module("utils.extra_config")  # first, as ComfyUI does: other packages have a `utils` too
    _choose_device(importlib.import_module("comfy.cli_args").args)
    folder_paths = importlib.import_module("folder_paths")
    _share_folders(folder_paths, output, input, paths)
    nodes = importlib.import_module("nodes")
    loop = asyncio.new_event_loop()
    importlib.import_module("server").PromptServer(loop)  # never served: custom nodes register their routes with it
    loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
    return dict(nodes.NODE_CLASS_MAPPINGS), dict(nodes.NODE_DISPLAY_NAME_MAPPINGS)


def _choose_device(args: Any) -> None:
    """ComfyUI takes a GPU for granted unless told, and looks for a web interface that nobody will see here."""
    import torch

    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    args.cpu = args.cpu or not has_gpu
    args.front_end_root = args.front_end_root or "."


def _share_folders(folder_paths: ModuleType, output: Path, input: Path, paths: ModelPaths) -> None:
    folder_paths.set_output_directory(str(output.resolve()))
    folder_paths.set_temp_directory(str(output.resolve() / "temp"))
    folder_paths.set_input_directory(str(input.resolve()))
    for kind in list(folder_paths.folder_names_and_paths):
        if kind != "custom_nodes":
            for folder in reversed(paths.folders(kind)):
                folder_paths.add_model_folder_path(kind, str(folder.resolve()), is_default=True)
    for folder in paths.folders("custom_nodes"):  # that a file of paths names; ComfyUI takes for granted that they are there
        if folder != paths.models / "custom_nodes" and folder.is_dir():
            folder_paths.add_model_folder_path("custom_nodes", str(folder.resolve()))
