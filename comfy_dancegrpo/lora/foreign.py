"""LoRAs in the names that others give them: diffusers' (of every age), ComfyUI's, kohya's, OneTrainer's. alpha is folded in on reading.

Which of diffusers' layers each layer of a file is, and which of its rows, is asked of a converter (of `lora.layouts`, or diffusers' own) with tensors
that hold nothing but their layer's number and the numbers of their rows: what it loses is noticed, and nothing is rounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..errors import RunError
from ..workflow.host import host
from .families import Family, flat, plain, recognise
from .layouts import kohya, reader, wan
from .layouts.fused import A, B, separate

_SIDES = {"A": "A", "B": "B", "down": "A", "up": "B"}
_PAIRED = re.compile(r"(?P<module>.+)\.(?:lora_(?P<peft>A|B)(?:\.\w+)?|lora[_.](?P<kohya>down|up)|lora_linear_layer\.(?P<old>down|up))\.weight")
_PROCESSOR = re.compile(r"(?P<block>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight")  # diffusers before 0.22
_TEXT = re.compile(r"lora_te\d?_|(text_encoder(_\d)?|text_encoders|te\d?|text_model|text_embedding_projection|cond_stage_model|conditioner)\.")
_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "lora_mid": "LoCon in Tucker's form",
          ".oft_": "OFT", ".diff": "whole weights", "_norm": "norms"}
_PEFT_HEADER = "lora_adapter_metadata"  # of diffusers 0.34 and later, in JSON


class Unread(ValueError):
    """Keys that are no LoRA's of the family; says which."""

    def __init__(self, keys: list[str]):
        super().__init__(keys)
        self.keys = sorted(keys)


@dataclass(frozen=True)
class Lora:
    """layers: A [r, in, ...] and B [out, r, ...] by the name of a layer as it is in the file, strength folded into B. left_out: layers of text encoders."""

    layers: dict[str, tuple[Tensor, Tensor]]
    left_out: tuple[str, ...]

    @property
    def widths(self) -> dict[str, int]:
        """Of the input of each layer, by its plain name."""
        return {plain(name.removeprefix(wan.LOW)): a.shape[1] for name, (a, _) in self.layers.items()}


def parse(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Lora:
    """A file's content. notes: its metadata. Raises `ValueError`, in the words that end "the LoRA in FILE ", for weights that no LoRA has."""
    sides: dict[str, dict[str, Tensor]] = {}
    alphas, odd = {}, []
    for key, value in tensors.items():
        if match := _PROCESSOR.fullmatch(key):
            sides.setdefault(f"{match['block']}.{match['layer']}{'.0' * (match['layer'] == 'to_out')}", {})[_SIDES[match["side"]]] = value
        elif match := _PAIRED.fullmatch(key):
            sides.setdefault(match["module"], {})[_SIDES[match["peft"] or match["kohya"] or match["old"]]] = value
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = value
        elif not _TEXT.match(key):
            odd.append(key)
    if odd:
        kind = next((kind for mark, kind in _KINDS.items() if mark in odd[0]), "weights that are no LoRA's")
        raise ValueError(f"has {kind} in {len(odd)} of its keys ({some(odd)}), accepted: a plain LoRA, of two matrices a layer")
    text = tuple(name for name in sides if _TEXT.match(name))
    layers = {name: _folded(name, pair, alphas.get(name), notes) for name, pair in sides.items() if name not in text}
    if lost := [name for name in alphas.keys() - sides.keys() if not _TEXT.match(name)]:
        raise ValueError(f"is damaged: it has alpha of {some(lost)}, and not the matrices")
    if not layers:
        raise ValueError("is of text encoders alone, which are not trained" if text else "has no weights")
    return Lora(layers, text)


def some(names) -> str:
    """A few of them."""
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _folded(name: str, pair: dict[str, Tensor], alpha: Tensor | None, notes: Mapping[str, str]) -> tuple[Tensor, Tensor]:
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or min(a.ndim, b.ndim) < 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"is damaged: the two matrices of {name} do not belong together")
    scale = _strength(name, len(a), notes) if alpha is None else float(alpha) / len(a)
    return a, b if scale == 1 else b * scale


def _strength(name: str, rank: int, notes: Mapping[str, str]) -> float:
    """alpha / rank as diffusers notes it in a file's metadata; without a note every loader takes 1."""
    try:
        told = json.loads(notes[_PEFT_HEADER])
        part, _, module = name.partition(".")
        alpha = float(told[f"{part}.lora_alpha"])
    except (KeyError, ValueError, TypeError):
        return 1.0
    patterns = told.get(f"{part}.alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns, module), alpha))
    return alpha / (rank ** 0.5 if told.get(f"{part}.use_rslora") else rank)


def of_file(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Lora:
    """`parse` in float32; says what is left out. Raises `RunError` where `parse` raises."""
    try:
        lora = parse({key: value.float() for key, value in tensors.items()}, notes)
    except ValueError as error:
        raise RunError(f"the LoRA in {path} {error}") from None
    if lora.left_out:
        host().say(f"{path.name}: {len(lora.left_out)} layers of text encoders are left out ({some(lora.left_out)}): they are not trained")
    return lora


def as_family(path: Path, lora: Lora, family: Family) -> dict[str, Tensor]:
    """`read`. Raises `RunError`, one line with the family that the LoRA is of, where it is not of this one."""
    try:
        return read(lora, family)
    except Unread as error:
        others = [found.title for found in recognise(lora.widths)]
        what = (f"is one of {' or '.join(others)} ({some(lora.layers)})" if others and family.title not in others else
                f"has {len(error.keys)} layers that are none of {family.title}'s ({some(error.keys)})" if others or len(error.keys) < len(lora.layers) else
                f"is of a family that is not known ({some(lora.layers)})")
        raise RunError(f"the LoRA in {path} {what}, accepted: one of {family.title}") from None


def read(lora: Lora, family: Family) -> dict[str, Tensor]:
    """As `lora.layouts` has it, in diffusers' names, those of the second of two experts after `wan.LOW`. Raises `Unread`."""
    found = {}
    for prefix in ("", wan.LOW):
        own = {name: pair for name, pair in lora.layers.items() if name.startswith(wan.LOW) == bool(prefix)}
        if own:
            found |= {prefix + name: value for name, value in _read(own, family).items()}
    return found


def _read(layers: dict[str, tuple[Tensor, Tensor]], family: Family) -> dict[str, Tensor]:
    names, lost = list(layers), list(layers)
    numbers = {plain(name.removeprefix(wan.LOW)): i for i, name in enumerate(names)}
    if len(numbers) < len(names):
        raise Unread([name for i, name in enumerate(names) if numbers[plain(name.removeprefix(wan.LOW))] != i])
    marked = {}
    for name, i in numbers.items():
        a, b = layers[names[i]]
        marked[name] = torch.full((), i).expand(1, a.shape[1]), torch.arange(len(b))[:, None]
    for attempt in (_as_they_are, _by_layout, _by_diffusers):
        if (sources := _sources(attempt(marked, names, family))) is None:
            continue
        read = {source for source, _ in sources.values()} - {source for name, (source, _) in sources.items() if not family.knows(name)}
        if len(read) == len(names):
            break
        lost = min(lost, [name for i, name in enumerate(names) if i not in read], key=len)
    else:
        raise Unread(lost)
    found = {}
    for i, name in enumerate(names):
        parts = {part: rows for part, (source, rows) in sources.items() if source == i}
        for part, (a, b) in zip(parts, separate(*layers[name], list(parts.values()))):
            found |= {part + A: a, part + B: b}
    return found


def _sources(tensors: dict[str, Tensor] | None) -> dict[str, tuple[int, Tensor]] | None:
    """Which layer of the file each layer of diffusers is, and which of its rows."""
    if tensors is None:
        return None
    return {name.removesuffix(A): (int(a[0, 0]), tensors[name.removesuffix(A) + B][:, 0].long()) for name, a in tensors.items() if name.endswith(A)}


def _as_they_are(marked: dict[str, tuple[Tensor, Tensor]], names: list[str], family: Family) -> dict[str, Tensor]:
    return _named({_with_dots(name, names[i]): pair for i, (name, pair) in enumerate(marked.items())})


def _by_layout(marked: dict[str, tuple[Tensor, Tensor]], names: list[str], family: Family) -> dict[str, Tensor] | None:
    if not family.read_by:
        return None
    try:
        return reader(family.read_by).from_file(
            _named({f"diffusion_model.{_with_dots(name, names[i])}": pair for i, (name, pair) in enumerate(marked.items())}))
    except KeyError:
        return None


def _by_diffusers(marked: dict[str, tuple[Tensor, Tensor]], names: list[str], family: Family) -> dict[str, Tensor] | None:
    """Layer by layer: one that its converter does not know would take the others with it, and beside input_blocks_10 it takes it for input_blocks_1."""
    if family.read_by:
        return None
    convert, found = getattr(diffusers, family.pipelines[0]).lora_state_dict, {}
    for name, pair in marked.items():
        if family.separator == "_":
            given = _named({f"lora_unet_{name.replace('.', '_')}": pair}, ".lora_down.weight", ".lora_up.weight")
        else:
            given = _named({f"diffusion_model.{name}": pair})
        try:
            converted = convert(given, unet_config=SimpleNamespace(layers_per_block=2))  # which all published have
            found |= parse(converted[0] if isinstance(converted, tuple) else converted, {}).layers
        except Exception:  # whatever its lines trip over; the layer is then missing
            continue
    return _named({plain(name): pair for name, pair in found.items()})


def _named(layers: Mapping[str, tuple[Tensor, Tensor]], a: str = A, b: str = B) -> dict[str, Tensor]:
    return {name + side: value for name, pair in layers.items() for side, value in zip((a, b), pair)}


def _with_dots(name: str, stored: str) -> str:
    return kohya.dotted(name) if flat(stored) else name
