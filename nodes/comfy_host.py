"""The host inside ComfyUI: its folders, progress, previews, stop button and memory. The one file of the nodes that imports ComfyUI."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import nodes as comfy_nodes
import torch
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.lora import listing
from comfy_dancegrpo.rewards import Reward
from comfy_dancegrpo.runs.folder import RunFolder
from comfy_dancegrpo.workflow import host
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from server import PromptServer

from . import HOST_CLASS_MAPPINGS, NODE_CLASS_MAPPINGS, routes


class ComfyHost(host.Host):
    """Active from the moment that ComfyUI loads the pack."""

    def __init__(self) -> None:
        super().__init__(comfy_nodes.NODE_CLASS_MAPPINGS, models=folder_paths.models_dir)
        self.registry = comfy_nodes.NODE_CLASS_MAPPINGS  # not a copy: packs that load later are in it too
        self.active_run: dict[str, Any] | None = None
        self._runs: dict[str, Path] = {}  # the last run of each Loop End
        self._running_node: str | None = None
        self._previews = host.Previews()
        self._patchers: weakref.WeakKeyDictionary[Any, WholePatcher] = weakref.WeakKeyDictionary()
        for kind in ("diffusers", "reward_models"):
            if kind not in folder_paths.folder_names_and_paths:
                folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))

    # -- folders ----------------------------------------------------------------------------------------------------
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

    @property
    def run_folder(self) -> Path | None:
        """Of the prompt that executes: this host outlives it, and what a later one saves is no part of its run."""
        prompt_id, folder = self._run
        return folder if prompt_id == _prompt_id() else None

    @run_folder.setter
    def run_folder(self, value: Path | None) -> None:
        self._run = _prompt_id(), value

    def model_folders(self, kind: str) -> list[Path]:
        try:
            return [Path(p) for p in folder_paths.get_folder_paths(kind)]
        except KeyError:
            return super().model_folders(kind)

    def lora_saved(self, path: Path) -> None:
        """Puts it where ComfyUI's LoRA loaders look too, under the same name unless a file of the user's has it."""
        listing.put(path, self.output_folder / "loras")

    # -- models -----------------------------------------------------------------------------------------------------
    def device(self) -> Any:
        return comfy.model_management.get_torch_device()

    def load(self, model: Any) -> None:
        if self._beside(model):
            model.to(self.device())
            return
        if model not in self._patchers:
            modules = torch.nn.ModuleList(model.modules)
            if (first := next(itertools.chain(modules.parameters(), modules.buffers()), None)) is None:
                return  # a reward that only measures
            self._patchers[model] = WholePatcher.of(model, modules, first.device)
        comfy.model_management.load_models_gpu([self._patchers[model]], force_full_load=True)

    def unload(self, model: Any) -> None:
        """ComfyUI moves what lies idle off its GPU when memory is short, or room is to be made."""
        if self._beside(model):
            model.leave()

    def _beside(self, model: Any) -> bool:
        """Whether it computes where ComfyUI does not, and so takes none of the memory that ComfyUI keeps account of."""
        return isinstance(model, Reward) and model.is_beside(self.device())

    def make_room(self) -> None:
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()

    def trainer(self, classes: Collection[type]) -> list[str]:
        temp = Path(folder_paths.get_temp_directory())
        temp.mkdir(parents=True, exist_ok=True)
        known = {kind: "\n".join(map(os.path.abspath, folders)) for kind, (folders, _) in folder_paths.folder_names_and_paths.items()}
        (temp / "dancegrpo_model_paths.yaml").write_text(json.dumps({"comfyui": known}), encoding="utf-8")  # YAML takes JSON
        words = ["--output", self.output_folder, "--input", self.input_folder, "--models", self.models_folder, "--previews", temp,
                 "--extra-model-paths", temp / "dancegrpo_model_paths.yaml"]
        ours = {*NODE_CLASS_MAPPINGS.values(), *(self.registry.get(name) for name in HOST_CLASS_MAPPINGS)}  # the latter have stand-ins there
        if not ours.issuperset(classes):
            words += ["--comfyui", folder_paths.base_path]
        return list(map(str, words))

    def around(self, node_class: type) -> contextlib.AbstractContextManager:
        ours = node_class.__module__.startswith("comfy_dancegrpo.")
        return contextlib.nullcontext() if ours else torch.inference_mode()

    # -- told by the engine -----------------------------------------------------------------------------------------
    def workflow_started(self, prompt: dict[str, dict], extra_pnginfo: dict[str, Any] | None) -> None:
        # ComfyUI notes in its prompt what IS_CHANGED returned; that is not the workflow's
        self.prompt = {node_id: {k: v for k, v in node.items() if k != "is_changed"} for node_id, node in prompt.items()}
        self.workflow_source = json.dumps((extra_pnginfo or {}).get("workflow", self.prompt)).encode()

    def node_started(self, node_id: str, class_type: str, title: str) -> None:
        self._leave_node()
        self._running_node = node_id
        self._send("executing", {"node": node_id, "display_node": node_id})
        get_progress_state().start_progress(node_id)

    def node_output(self, node_id: str, ui: dict[str, Any]) -> None:
        self._send("executed", {"node": node_id, "display_node": node_id, "output": ui})
        self._previews.shown(Path(folder_paths.get_temp_directory()), node_id, ui)

    def progress(self, value: float, total: float, text: str = "") -> None:
        """Of iterations (with text) on the node that ComfyUI executes, Loop End; of micro-batches on the body's node that runs."""
        if text:
            logging.info("DanceGRPO %g/%g %s", value, total, text)
        context = get_executing_context()
        executing = context.node_id if context is not None else None
        node_id = executing if text else self._running_node or executing
        if node_id is not None:
            get_progress_state().update_progress(node_id, value, total, None)

    def say(self, line: str) -> None:
        logging.info("DanceGRPO: %s", line)

    def check_interrupt(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def run_started(self, folder: Path, node_id: str) -> None:
        super().run_started(folder, node_id)
        self._runs[node_id] = folder
        self.active_run = {"run": folder.name, "node": node_id, "prompt_id": _prompt_id()}

    def run_moved(self, folder: Path, iteration: int, iterations: int) -> None:
        self._leave_node()
        self.active_run = {**(self.active_run or {}), "iteration": iteration, "iterations": iterations}
        self._tell("running")

    def run_ended(self, folder: Path, state: str) -> None:
        super().run_ended(folder, state)
        self._leave_node()
        self._tell(state)
        self.active_run = None

    def must_run(self, node_id: str) -> bool:
        folder = self._runs.get(node_id)
        again = any(node["inputs"].get("on_existing") == "restart" for node in self.prompt.values())
        if folder is None:
            return False  # nothing is cached yet, and this value must be that of a finished run
        if again or RunFolder(folder).record.get("state") != "finished":
            return True
        self.say(f"run {folder.name!r} in {folder} is finished; unless its nodes have changed, nothing is trained")
        return False

    # -- the page ---------------------------------------------------------------------------------------------------
    def _leave_node(self) -> None:
        if self._running_node is not None:
            get_progress_state().finish_progress(self._running_node)
            self._running_node = None

    def _tell(self, state: str) -> None:
        """To every page, not only to the one that queued: it may have been reloaded since."""
        PromptServer.instance.send_sync("dancegrpo.run", {**(self.active_run or {}), "state": state})

    @staticmethod
    def _send(event: str, data: dict[str, Any]) -> None:
        server, context = PromptServer.instance, get_executing_context()
        if server.client_id is not None and context is not None:
            server.send_sync(event, {**data, "prompt_id": context.prompt_id}, server.client_id)


def _prompt_id() -> str | None:
    """Of what this thread executes, if anything."""
    context = get_executing_context()
    return context.prompt_id if context is not None else None


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """A policy or a reward in ComfyUI's list of loaded models, so that training and other models share one GPU.

    It is moved whole or not at all, and never cast or patched: an optimizer holds the very parameters of its adapter.
    """

    @classmethod
    def of(cls, model: Any, modules: torch.nn.ModuleList, device: torch.device) -> WholePatcher:
        """modules: of `model`, now on `device`."""
        modules.device = device
        patcher = cls(modules, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())
        patcher.move = weakref.WeakMethod(getattr(model, "move", model.to))  # a reward's `to` brings it to its own device only
        return patcher

    def loaded_size(self) -> int:
        return self.model_size() if self.model.device == self.load_device else 0

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False, **options) -> int:
        before = self.loaded_size()
        self._move(device_to)
        return self.loaded_size() - before

    def partially_unload(self, device_to, memory_to_free=0, **options) -> int:
        return 0  # ComfyUI then unloads it whole

    def patch_model(self, device_to=None, *arguments, **options):
        self._move(device_to)
        return self.model

    def unpatch_model(self, device_to=None, unpatch_weights=True) -> None:
        if unpatch_weights:
            self._move(device_to)

    def _move(self, device: Any) -> None:
        move = self.move()
        if device is not None and move is not None:
            move(device)
            self.model.device = device


def apply_lora(model: Any, clip: Any, tensors: dict[str, torch.Tensor], strength: float) -> tuple[Any, Any]:
    """Copies of ComfyUI's MODEL and CLIP (or None) with a LoRA in diffusers' key names. Raises `RunError` where a key finds no weight."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    lora = comfy.lora_convert.convert_lora(dict(tensors))
    patches = comfy.lora.load_lora(lora, keys, log_missing=False)
    modules = [model.model, *([clip.cond_stage_model] if clip is not None else [])]
    _check_places(lora, patches, {name: value for module in modules for name, value in module.state_dict().items()})
    patched = [x.clone() if x is not None else None for x in (model, clip)]
    for x in patched:
        if x is not None:
            x.add_patches(patches, strength)
    return patched[0], patched[1]


def apply_weights(model: Any, tensors: dict[str, torch.Tensor], strength: float) -> Any:
    """A copy of ComfyUI's MODEL between its own weights (strength 0) and a denoiser's state in diffusers' names (1). Raises `RunError` where they do not fit."""
    weights = model.model.diffusion_model.state_dict()
    found = _comfy_names(model.model, weights, tensors)
    if left := found.keys() ^ weights.keys():
        raise RunError(f"the weights do not fit this model: {len(left)} of {len(weights)} names differ, such as {min(left)!r}; accepted: a model of the "
                       "same family, or the file that Save LoRA writes, in ComfyUI's own Load Diffusion Model")
    for name, value in found.items():
        if value.shape != weights[name].shape:
            raise RunError(f"the weights do not fit this model, which is of another size: {name} is {list(value.shape)} in the one and "
                           f"{list(weights[name].shape)} in the other")
    patched = model.clone()
    patched.add_patches({f"diffusion_model.{name}": ("diff", (value,)) for name, value in found.items()}, strength, 1 - strength)
    return patched


def _comfy_names(model: Any, weights: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By ComfyUI's own maps; what they have no place for keeps its name."""
    if weights.keys() == tensors.keys():
        return tensors
    unet = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    if unet:
        return {unet.get(name, name): value for name, value in tensors.items()}
    left = {name: value.clone() for name, value in tensors.items()}  # it swaps halves of some in place
    return {**(comfy.model_detection.convert_diffusers_mmdit(left) or {}), **left}


def _check_places(lora: dict[str, torch.Tensor], patches: dict[Any, Any], weights: dict[str, torch.Tensor]) -> None:
    """Raises `RunError` where a tensor finds no weight, or one of another size: ComfyUI would log that, and draw without it."""
    left = lora.keys() - {name for patch in patches.values() for name in patch.loaded_keys}
    targets = [((key, None) if isinstance(key, str) else key[:2], patch) for key, patch in patches.items()]
    left |= {name for (name, _), _ in targets if name not in weights}
    if left:
        raise RunError(f"the LoRA does not fit this model: {len(left)} of its {len(lora)} weights find no place, such as {min(left)!r}")
    for (name, part), patch in targets:
        weight = weights[name] if part is None else weights[name].narrow(*part)
        up, down = patch.weights[:2]
        found, accepted = (len(up), down[0].numel()), (len(weight), weight[0].numel())
        if found != accepted:
            raise RunError(f"the LoRA does not fit this model, which is of another size: for {name} found {found[0]} x {found[1]}, "
                           f"accepted: {accepted[0]} x {accepted[1]}")


def activate() -> None:
    """Makes ComfyUI the process's host; a program that lends ComfyUI's nodes puts its own host above it."""
    active = ComfyHost()
    host._active.append(active)
    routes.add_routes(PromptServer.instance.routes, lambda: active.output_folder, lambda: active.active_run)
