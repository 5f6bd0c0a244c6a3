"""A LoRA file in other names. Without the base model, unless a fused layer of the file's names lacks a part, whose height the model alone tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor

from .. import policies
from ..atomic import replacing
from ..errors import RunError
from ..policies import places, single_file
from . import families, files, foreign
from .families import Family
from .layouts import fused, kohya, layout
from .layouts.wan import LOW

NAMES = ("ours", "diffusers", "kohya")
# whose layers have in our files the names that kohya flattens
_BY_KOHYA = ("Stable Diffusion 1", "Stable Diffusion 2", "SDXL", "Wan", "Qwen-Image", "LTX-Video")
# metadata of the former content; ours would be taken at its word
_STALE = re.compile(r"sshs_.*|modelspec\.hash.*|lora_adapter_metadata|dancegrpo\..*")


@dataclass(frozen=True)
class Found:
    """A LoRA file as it was read. layers: as `lora.layouts` has it. families: that it may be of; several where their files have the same names."""

    path: Path
    layers: dict[str, Tensor]
    families: tuple[Family, ...]
    header: dict[str, str] = field(repr=False)
    dtype: torch.dtype = torch.float32

    @property
    def rank(self) -> int:
        return max(len(a) for name, a in self.layers.items() if name.endswith(fused.A))

    def summary(self) -> list[str]:
        """Lines for a person."""
        told = [f"{key.partition('.')[2]}: {value}" for key, value in sorted(self.header.items()) if key.startswith("dancegrpo.")]
        count = sum(name.endswith(fused.A) for name in self.layers)
        return [f"{self.path}: {' or '.join(family.title for family in self.families)}, {count} layers, rank {self.rank}", *told]


def read(path: Path, policy: str = "") -> Found:
    """A file in any of the names that are known. policy: what the LoRA is of, as Load Policy names it; "" goes by the names alone.

    Raises `RunError`, one line, for a file that is no LoRA, of no family that is known, or of several, or not of the policy.
    """
    stored, header = files.read(path)
    lora = foreign.of_file(path, stored, header)
    base, shapes = _of_policy(policy) if policy else (None, {})
    candidates = [base] if base else families.recognise(lora.widths)
    if not candidates:
        raise RunError(f"the LoRA in {path} is of a family that is not known (its layers: {foreign.some(lora.layers)})")
    readings = {family: found for family in candidates if (found := _read(lora, family)) is not None}
    readings = readings or {candidates[0]: foreign.as_family(path, lora, candidates[0])}  # which says why
    if len({(family.layout, *sorted(found)) for family, found in readings.items()}) > 1:
        raise RunError(f"the LoRA in {path} may be of {' or '.join(family.title for family in readings)}; say of which base model with --policy")
    layers = next(iter(readings.values()))
    if base:
        layers = _fitted(path, layers, shapes)
        complete = getattr(layout(base.layout), "completed", None)
        layers = complete(layers, shapes) if complete else layers
    kinds = {value.dtype for value in stored.values() if value.ndim > 1}
    return Found(path, layers, tuple(readings), header, kinds.pop() if len(kinds) == 1 else torch.float32)


def _read(lora: foreign.Lora, family: Family) -> dict[str, Tensor] | None:
    try:
        return foreign.read(lora, family)
    except foreign.Unread:
        return None


def write(found: Found, path: Path, names: str) -> list[Path]:
    """The file in other names, of two experts the two files; returns them. Raises `RunError` where these names have no place for it."""
    contents = {path.with_name(path.stem + suffix + path.suffix): content for suffix, content in _contents(found, names).items()}
    if there := next((target for target in contents if target.exists()), None):  # before the first is written
        raise RunError(f"found {there}, which is there already, accepted: a file that is not")
    for target, content in contents.items():
        header = {key: value for key, value in found.header.items() if not _STALE.fullmatch(key)}
        header |= {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers", "modelspec.title": target.stem}
        if len(found.families) == 1:
            header["modelspec.architecture"] = f"{found.families[0].architecture}/lora"
        with replacing(target) as beside:
            save_file({name: _apart(value, found.dtype) for name, value in content.items()}, beside, metadata=header)
    return list(contents)


def _apart(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of its own: the parts of a fused layer share an A, and safetensors takes no two tensors in one place. alpha stays float32."""
    return value.to(dtype if value.ndim else value.dtype, copy=True).contiguous()


def _contents(found: Found, names: str) -> dict[str, dict[str, Tensor]]:
    family = found.families[0]
    if names == "diffusers":
        return {"": {("" if name.startswith(LOW) else f"{family.denoiser}.") + name: value for name, value in found.layers.items()}}
    own = layout(family.layout)
    parts = own.split(found.layers) if hasattr(own, "split") else {"": found.layers}
    try:
        parts = {suffix: own.to_file(part) for suffix, part in parts.items()}
    except KeyError as error:
        raise RunError(f"the LoRA in {found.path} lacks {error.args[0]!r}, which is one layer with others in {family.title}'s files: "
                       "its shape is the base model's; name that with --policy") from None
    if names == "ours":
        return parts
    if family.title not in _BY_KOHYA:
        raise RunError(f"kohya's names are not written for {family.title}, accepted: {', '.join(_BY_KOHYA)}; ComfyUI and diffusers read ours")
    return {suffix: _flattened(part) for suffix, part in parts.items()}


def _flattened(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With an alpha for each layer, which kohya's own programs want: the rank, which is full strength."""
    if not all(name.startswith(kohya.PREFIX) for name in part):
        part = kohya.to_file({_without_prefix(name): value for name, value in part.items()})
    down = ".lora_down.weight"
    return {**part, **{name.removesuffix(down) + ".alpha": torch.tensor(float(len(a))) for name, a in part.items() if name.endswith(down)}}


def _without_prefix(name: str) -> str:
    return next(name.removeprefix(before) for before in families.DOTTED if name.startswith(before))


# -- the base model, of which nothing but its shapes is asked ------------------------------------------------------------------
def _of_policy(name: str) -> tuple[Family, dict[str, tuple[int, ...]]]:
    """A policy's family, and the shapes of its denoisers' weights by layer."""
    found, folders = policies.resolve(policies.find(name), places.Parts())
    shapes: dict[str, tuple[int, ...]] = {}
    for component, prefix in (("unet", ""), ("transformer", ""), ("transformer_2", LOW)):
        if component in places.components(folders[0]):
            kind, config = single_file._class_of(folders[0], component)
            with init_empty_weights():
                denoiser = kind.from_config(kind.load_config(config, local_files_only=True))
            shapes |= {prefix + layer.removesuffix(".weight"): tuple(p.shape) for layer, p in denoiser.named_parameters()
                       if layer.endswith(".weight") and p.ndim > 1}
    return families.of_pipeline(next(pipeline for pipeline, told in policies.FAMILIES.items() if told == found)), shapes


def _fitted(path: Path, layers: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The layers themselves. Raises `RunError` for a layer that is not the model's, or of another size."""
    for name, a in layers.items():
        if name.endswith(fused.A):
            layer = name.removesuffix(fused.A)
            found = (len(layers[layer + fused.B]), a.shape[1])
            if found != shapes.get(layer, ())[:2]:
                there = list(shapes[layer][:2]) if layer in shapes else "not"
                raise RunError(f"the LoRA in {path} does not fit this policy: {layer} is {list(found)} in the one and {there} in the other")
    return layers
