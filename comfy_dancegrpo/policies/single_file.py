"""Policies from the single files of ComfyUI's users: a denoiser or a whole checkpoint, with separate VAE and text encoders.

Weights come from the files, configurations and tokenizers from a diffusers folder of the same family; names and shapes are brought to
diffusers' by its own converters (`diffusers.loaders.single_file_utils`), tried first on tensors without content.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file
from torch import Tensor

from .. import headers
from ..errors import RunError
from ..workflow.host import host
from . import places, quantization
from .recognise import HELD, TEXTS, own_name, prefix

_SAME_LAYOUT = {"AutoencoderKLQwenImage": "AutoencoderKLWan"}  # classes that diffusers converts no file of -> one of the same layout
_LTX2 = {
    # its components of which diffusers converts no file -> their names in a whole checkpoint, and in diffusers' modules what of these
    "vocoder": (r"vocoder\.(.+)", ((r"^ups\.", "upsamplers."), (r"^resblocks\.", "resnets."), (r"^conv_pre\.", "conv_in."), (r"^conv_post\.", "conv_out."))),
    "connectors": (r"(?:model\.diffusion_model\.)?((?:text_embedding_projection|(?:video|audio)_embeddings_connector)\..+)", (
        (r"^text_embedding_projection\.aggregate_embed\.", "text_proj_in."), (r"^(video|audio)_embeddings_connector\.", r"\1_connector."),
        (r"\.transformer_1d_blocks\.", ".transformer_blocks."), (r"\.([qk])_norm\.", r".norm_\1."))),
}


class DoesNotFit(ValueError):
    """The file's tensors are not those of a configuration; says how."""


def load(file: Path, folders: list[Path], parts: dict[str, Path], dtype: torch.dtype,
         quantized: str = quantization.NONE) -> tuple[Path, dict[str, torch.nn.Module]]:
    """The folder that fits, and the loaded modules by component: what the file and `parts` hold; the rest is the folder's.

    Raises `RunError`, one line: no folder fits, a part does not, or weights of a component are nowhere.
    """
    header, reasons = headers.read(file), []
    before = prefix(header)
    for folder in folders:
        try:
            _convert(*_class_of(folder, _denoiser(folder)), _denoiser_tensors(_empty(header), before))
        except DoesNotFit as error:
            reasons.append(f"{folder}: {error}")
        else:
            break
    else:
        raise RunError(f'input "policy": found {file}, which fits no folder of its family ({"; ".join(reasons)})')
    if line := places.lacking(folder, parts, file):
        raise RunError(line)
    modules = {name: separate(folder, name, path, dtype, quantized) for name, path in parts.items()}
    tensors = load_file(file)
    modules[_denoiser(folder)] = _module(*_class_of(folder, _denoiser(folder)), _denoiser_tensors(tensors, before), dtype, quantized)
    for component in places.components(folder):
        if component not in modules and (found := _contained(folder, component, tensors, dtype, file)) is not None:
            modules[component] = found
    return folder, modules


def separate(folder: Path, component: str, file: Path, dtype: torch.dtype, quantized: str = quantization.NONE) -> torch.nn.Module:
    """A part from a file of its own. Raises `RunError` where it is not the one that the folder configures. quantized: of a second expert."""
    header = headers.read(file)
    if line := places.superfluous(folder, {component: file}):
        raise RunError(line)
    cls, config = _class_of(folder, component)
    tensors = load_file(file)
    try:
        if component in places.DENOISERS:
            return _module(cls, config, _denoiser_tensors(tensors, prefix(header)), dtype, quantized)
        if hasattr(cls, "load_config"):
            return _module(cls, config, _within(tensors, HELD["vae"]) or tensors, dtype)
        return _encoder(cls, config, tensors, dtype)
    except DoesNotFit as error:
        raise RunError(f'input "{component}": found {file}, which is not the {cls.__name__} of {config}: {error}') from None


# -- classes and configurations ----------------------------------------------------------------------------------------------
def _denoiser(folder: Path) -> str:
    """The one that a file holds."""
    return places.denoisers(folder)[0]


def _class_of(folder: Path, component: str) -> tuple[type, Path]:
    """A component's class, and where its configuration is. Raises `RunError` where there is none."""
    library, name = places.index(folder)[component]
    config = folder / component
    if not (config / "config.json").is_file():
        raise RunError(f'input "components": {folder} has no {component}/config.json')
    module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    return getattr(importlib.import_module(module), name), config


# -- modules of diffusers ----------------------------------------------------------------------------------------------------
def _empty(header: dict[str, headers.Stored]) -> dict[str, Tensor]:
    """Tensors of the file's names and shapes, without content."""
    return {name: torch.empty(stored.shape, device="meta") for name, stored in header.items()}


def _within(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(p): value for name, value in tensors.items() for p in prefixes if name.startswith(p)}


def _of_ltx2(component: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A component's of `_LTX2` among those of a whole checkpoint, in diffusers' names."""
    of, pairs = _LTX2[component]
    found = {}
    for name, value in tensors.items():
        if match := re.fullmatch(of, name):
            own = match[1]
            for pattern, new in pairs:
                own = re.sub(pattern, new, own)
            found[own] = value
    return found


def _denoiser_tensors(tensors: dict[str, Tensor], before: str) -> dict[str, Tensor]:
    return {own: value for name, value in tensors.items() if (own := own_name(name, before))}


def _convert(cls: type, config: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in diffusers' names and shapes. Raises `DoesNotFit` where they are not exactly those of the configuration."""
    configured = cls.load_config(config, local_files_only=True)
    with init_empty_weights():
        wanted = cls.from_config(configured).state_dict()
    ignored = tuple(cls._keys_to_ignore_on_load_unexpected or ())
    if not wanted.keys() <= tensors.keys():
        layout = SINGLE_FILE_LOADABLE_CLASSES.get(_SAME_LAYOUT.get(cls.__name__, cls.__name__))
        if layout is None:
            raise DoesNotFit(f"diffusers has no converter for {cls.__name__}; accepted: a file in diffusers' names")
        if cls.__name__ == "UNet2DConditionModel":  # this converter wants the names of a whole checkpoint
            tensors = {single_file_utils.LDM_UNET_KEY + name: value for name, value in tensors.items()}
        try:
            tensors = layout["checkpoint_mapping_fn"](checkpoint=dict(tensors), config=configured)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise DoesNotFit(f"it is not in the layout of {cls.__name__} ({type(error).__name__}: {error})") from None
    if missing := wanted.keys() - tensors.keys():
        raise DoesNotFit(f"it lacks {len(missing)} of {len(wanted)} tensors, such as {min(missing)}")
    for name, value in wanted.items():
        if tensors[name].shape != value.shape:
            raise DoesNotFit(f"{name} is {list(tensors[name].shape)}, and {list(value.shape)} in the configuration")
    if odd := [name for name in tensors.keys() - wanted.keys() if not name.startswith(ignored or ("\0",))]:
        raise DoesNotFit(f"it has {len(odd)} tensors more, such as {min(odd)}")
    return {name: tensors[name] for name in wanted}


def _module(cls: type, config: Path, tensors: dict[str, Tensor], dtype: torch.dtype, quantized: str = quantization.NONE) -> torch.nn.Module:
    converted = _convert(cls, config, tensors)
    with init_empty_weights():
        module = cls.from_config(cls.load_config(config, local_files_only=True))
    exact = tuple(cls._keep_in_fp32_modules or ())  # as from_pretrained has it
    of = {name: torch.float32 if set(name.split(".")) & set(exact) else dtype for name in converted}
    module.load_state_dict({name: value.to(of[name]).contiguous() if value.is_floating_point() else value
                            for name, value in converted.items()}, assign=True)
    if quantized != quantization.NONE:
        quantization.apply(quantized, module)
    return module.eval()


# -- encoders of texts and pictures ------------------------------------------------------------------------------------------
def _encoder(cls: type, config: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """By transformers' own loader, which knows the names that its versions gave a model."""
    configured = cls.config_class.from_pretrained(config, local_files_only=True)
    try:
        module, found = cls.from_pretrained(None, config=configured, state_dict=tensors, output_loading_info=True, local_files_only=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise DoesNotFit(" ".join(str(error).split())[:300]) from None
    if found.get("mismatched_keys"):
        name, theirs, ours = sorted(map(tuple, found["mismatched_keys"]))[0]
        raise DoesNotFit(f"{name} is {list(theirs)}, and {list(ours)} in the configuration")
    if found["missing_keys"]:
        raise DoesNotFit(f"it lacks {len(found['missing_keys'])} tensors, such as {min(found['missing_keys'])}")
    return module.to(dtype).eval()


def _contained(folder: Path, component: str, tensors: dict[str, Tensor], dtype: torch.dtype, file: Path) -> torch.nn.Module | None:
    """A component that a whole checkpoint holds too; None where its weights are the folder's. Raises `RunError` where they are nowhere."""
    if own := _of_ltx2(component, tensors) if component in _LTX2 else _within(tensors, HELD.get(component, ())):
        cls, config = _class_of(folder, component)
        try:
            return _module(cls, config, own, dtype)
        except DoesNotFit as error:
            if component != "vae" and not places.weights_missing(folder, component):
                host().say(f"the {component} in {file} is in no layout that is known ({error}); that of {folder} is taken")
                return None
            raise RunError(f'input "policy": the {component} in {file} is not that of {config}: {error}') from None
    if component.startswith("text_encoder") and any(name.startswith(TEXTS) for name in tensors):
        cls, _ = _class_of(folder, component)
        known = {"checkpoint": tensors, "subfolder": component, "config": str(folder), "torch_dtype": dtype, "local_files_only": True}
        if single_file_utils.is_clip_model_in_single_file(cls, tensors):
            return _whole(single_file_utils.create_diffusers_clip_model_from_ldm(cls, **known), component, file)
        if cls.__name__ == "T5EncoderModel" and single_file_utils.is_t5_in_single_file(tensors):
            return _whole(single_file_utils.create_diffusers_t5_model_from_checkpoint(cls, **known), component, file)
    if missing := places.weights_missing(folder, component):
        raise RunError(places.nowhere(file, component, missing))
    return None


def _whole(module: torch.nn.Module, component: str, file: Path) -> torch.nn.Module:
    if lacking := [name for name, p in module.named_parameters() if p.is_meta]:
        raise RunError(f'input "policy": the {component} in {file} lacks {len(lacking)} tensors, such as {lacking[0]}')
    return module.eval()


