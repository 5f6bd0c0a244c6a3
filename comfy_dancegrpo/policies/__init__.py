"""Model families: one file each, and one line here. Importing this package imports none of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from .. import headers
from ..embedded import POLICIES as EMBEDDED
from ..errors import RunError
from ..quiet import quiet_loading
from . import kernels, places, quantization, recognise
from .places import Parts

if TYPE_CHECKING:
    from .base import Policy

FAMILIES: dict[str, tuple[str, str]] = {
    # `_class_name` of a diffusers folder's model_index.json -> (module, class)
    "FluxPipeline": ("flux", "Flux"),
    "FluxKontextPipeline": ("flux", "FluxKontext"),
    "Flux2Pipeline": ("flux2", "Flux2"),
    "Flux2KleinPipeline": ("flux2", "Flux2Klein"),
    "HunyuanVideoPipeline": ("hunyuan_video", "HunyuanVideo"),
    "HunyuanSkyreelsImageToVideoPipeline": ("skyreels", "SkyReels"),
    "LTXPipeline": ("ltx", "LTX"),
    "LTXImageToVideoPipeline": ("ltx", "LTXImageToVideo"),
    "LTX2Pipeline": ("ltx2", "LTX2"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion", "StableDiffusionXL"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "QwenImageEditPipeline": ("qwen_image", "QwenImageEdit"),
    "QwenImageEditPlusPipeline": ("qwen_image", "QwenImageEditPlus"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "WanPipeline": ("wan", "Wan"),
    "WanImageToVideoPipeline": ("wan", "WanImageToVideo"),
}
DTYPES = ("float32", "bfloat16", "float16")
PROMPT_CACHES = ("memory", "disk")


def available() -> list[str]:
    """Names that `load` takes: the embedded policies, diffusers folders, hub ids in the cache, and single files."""
    return [*EMBEDDED, *places.diffusers_folders(), *places.single_files("checkpoints", "diffusion_models")]


def problem(name: str, parts: Parts = Parts()) -> str | None:
    """Why `load(name)` would fail, in one line, as far as it is found without loading anything; None where nothing is."""
    try:
        path, given = find(name), parts.files()
        _, folders = resolve(path, parts)
        for file in given.values():
            headers.read(file)
        if path in EMBEDDED.values():  # one of them shares the weights of the other
            return places.superfluous(path, given)
        lines = [places.lacking(folder, given, path if path.is_file() else None) for folder in folders]
        return lines[0] if all(lines) else None  # which of several fits the file is known once it is opened
    except RunError as error:
        return str(error)


def find(name: str) -> Path:
    """The diffusers folder, or the single file, of a policy. Raises `RunError` naming the folders searched."""
    return EMBEDDED.get(name) or places.policy(name)


def resolve(path: Path, parts: Parts) -> tuple[tuple[str, str], list[Path]]:
    """The family's (module, class), and the diffusers folders whose configurations may be that of `path`: itself, or a file's."""
    given = parts.files()
    if path.is_dir():
        if parts.components:
            raise RunError(f'input "components": found {parts.components!r}, accepted beside a diffusers folder: nothing, it has its own')
        family = _family(path)
        _second_expert(given, [_named(path)])
        return family, [path]
    if path.suffix != places.SUFFIX:
        raise RunError(f'input "policy": found {path}, accepted: a diffusers folder, or a {places.SUFFIX} file')
    known = [name for name in recognise.pipelines(headers.read(path), path) if name in FAMILIES]
    if not known:
        raise RunError(f'input "policy": found {path}, a file of {recognise.pipelines(headers.read(path), path)[0]}, which is not supported yet')
    _second_expert(given, known)
    if parts.components:
        folder = places.policy(parts.components)
        if _named(folder) not in known:
            raise RunError(f'input "components": found {folder} of {_named(folder)}, accepted for {path.name}: a diffusers folder of {" or ".join(known)}')
        return _family(folder), [folder]
    found = [folder for folder in map(places.policy, places.diffusers_folders()) if places.pipeline_class(folder) in known]
    if not found:
        raise RunError(f'input "policy": found {path}, a file of {" or ".join(known)}, and its configurations and tokenizers are nowhere; accepted: '
                       f"beside it a diffusers folder of that pipeline (its weights may be left out) in {places.searched(places.KINDS)}")
    found.sort(key=lambda folder: (known.index(_named(folder)), places.superfluous(folder, given) is not None))
    return _family(found[0]), found


def _second_expert(given: dict[str, Path], known: list[str]) -> None:
    """Raises `RunError` where a file is given for it that is of none of these pipelines."""
    if file := given.get("transformer_2"):
        found = recognise.pipelines(headers.read(file), file, "transformer_2")
        if not set(found) & set(known):
            raise RunError(f'input "transformer_2": found {file}, a file of {" or ".join(found)}, accepted: one of {" or ".join(known)}')


def _named(folder: Path) -> str:
    """The pipeline class that a diffusers folder names. Raises `RunError` where it names none."""
    accepted = "accepted: a diffusers folder of " + ", ".join(FAMILIES)
    if not (folder / places.INDEX).is_file():
        raise RunError(f'input "policy": found {folder}, which has no model_index.json; {accepted}')
    if (name := places.pipeline_class(folder)) is None:
        raise RunError(f'input "policy": found {folder / places.INDEX}, which names no pipeline class; {accepted}')
    return name


def _family(folder: Path) -> tuple[str, str]:
    name = _named(folder)
    if name not in FAMILIES:
        raise RunError(f'input "policy": found {name} in {folder / places.INDEX}, a family that is not known; '
                       f'accepted: a diffusers folder of {", ".join(FAMILIES)}')
    for component in places.components(folder):
        library, *classes = places.index(folder)[component]
        if library not in ("diffusers", "transformers", "stable_diffusion", "ltx2"):  # diffusers would import code of that name from the folder
            raise RunError(f'input "policy": found the library {library!r} in {folder / places.INDEX}, accepted: diffusers and transformers')
        if len(classes) != 1 or not isinstance(classes[0], str):
            raise RunError(f'input "policy": found {component!r} in {folder / places.INDEX} without a class, accepted: a library and a class of it')
        if (code := folder / component / f"{library}.py").exists():  # which diffusers takes for the library; before it asked first, it ran it
            raise RunError(f'input "policy": found code in {code}, accepted: a diffusers folder without code of its own')
    return FAMILIES[name]


def _class(module: str, name: str) -> type[Policy]:
    """Raises `RunError` where the installed diffusers is too old to have the family's pipeline, or to run it as it is trained."""
    try:
        found = getattr(importlib.import_module(f".{module}", __name__), name)
        why = f"{found.diffusers_from} or later"
    except ImportError as error:
        found, why = None, error
    import diffusers

    if found is None or _numbers(diffusers.__version__) < _numbers(found.diffusers_from):
        raise RunError(f'input "policy": {name} needs a newer diffusers than {diffusers.__version__}: {why}')
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """The first two."""
    return tuple(map(int, version.split(".")[:2]))


def load(name: str, dtype: str = "float32", parts: Parts = Parts(), prompt_cache: str = "memory", guidance_scale_2: float = 0.0,
         quantized: str = quantization.NONE, attention_backend: str = kernels.DEFAULT, compile: bool = False) -> Policy:
    """Loads a policy's weights, frozen, onto this process's device. Raises `RunError` where `problem` names one.

    guidance_scale_2: of a second expert, that of low noise (Wan 2.2 A14B); 0 takes that of the first. quantized: how the denoisers
    are, one of `quantization.KINDS`. attention_backend: of theirs, one of `kernels.BACKENDS`. compile: whether their blocks are compiled.
    """
    if line := problem(name, parts) or quantization.problem(quantized):
        raise RunError(line)
    path, given = find(name), parts.files()
    _, folders = resolve(path, parts)
    with quiet_loading():
        components = {}
        if path.is_file() or given or quantized != quantization.NONE:
            import torch

            from .. import processes
            from . import single_file

            with processes.outside_inference_mode():
                of = getattr(torch, dtype)
                if path.is_file():
                    folders[0], components = single_file.load(path, folders, given, of, quantized)
                else:
                    components = {component: single_file.separate(path, component, file, of, quantized) for component, file in given.items()}
            components |= quantization.options(quantized, set(places.denoisers(folders[0])) - components.keys(), of)
        policy = _class(*_family(folders[0])).load(name, folders[0], dtype, **components)
    policy.sources, policy.prompt_cache, policy.quantized = (path, folders[0], *given.values()), prompt_cache, quantized
    if guidance_scale_2:
        policy.guide_low_noise(guidance_scale_2)
    with quiet_loading():
        kernels.choose_attention(policy, attention_backend)
        if compile:
            kernels.compile_blocks(policy)
    return policy
