"""Where policies and their parts are on this machine: diffusers folders, the Hugging Face cache, single files. No network is asked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .. import headers, hub
from ..errors import RunError
from ..workflow.host import host

KINDS = ("diffusers", "checkpoints", "diffusion_models")  # model folders that are searched, in this order
SUFFIX = ".safetensors"
INDEX = "model_index.json"
HALF = "fp16"  # the variant of weights that is published beside others, or alone
_WITHOUT_WEIGHTS = re.compile(r"Tokenizer|Processor|Scheduler|FeatureExtractor")  # in the names of classes


@dataclass(frozen=True)
class Parts:
    """Files in place of a policy's own parts, by their names in the model folders; "" takes the policy's own.

    components: the diffusers folder from which a single file takes what is not in it; "" takes one that fits.
    """

    vae: str = ""
    text_encoder: str = ""
    text_encoder_2: str = ""
    text_encoder_3: str = ""
    components: str = ""

    def files(self) -> dict[str, Path]:
        """The given files by component. Raises `RunError` for one that is nowhere."""
        found = {}
        for component in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            if name := getattr(self, component):
                found[component] = _file("vae" if component == "vae" else "text_encoders", name, component)
        return found


def _file(kind: str, name: str, input: str) -> Path:
    path = host().find_model(kind, name)
    if path is None or not path.is_file():
        raise RunError(f'input "{input}": found {name!r}, which is in none of the folders searched ({searched([kind])})')
    return path


def searched(kinds) -> str:
    """The folders of these kinds, in words."""
    return ", ".join(str(folder) for kind in kinds for folder in host().model_folders(kind))


def policy(name: str) -> Path:
    """The diffusers folder, or the single file, of that name. Raises `RunError` naming the folders searched."""
    for kind in KINDS:
        if path := host().find_model(kind, name):
            return path
    if hub.cached(f"{name}/{INDEX}"):
        return hub.cached(name)
    raise RunError(f'input "policy": found {name!r}, which is in none of the folders searched ({searched(KINDS)}{hub.in_words(name)}){hub.to_get(name)}')


def diffusers_folders() -> list[str]:
    """The names of diffusers folders: those directly in the model folders, then the hub ids in the cache."""
    names = {name for kind in KINDS for name in host().list_models(kind)
             if (path := host().find_model(kind, name)) and (path / INDEX).is_file()}
    return sorted(names) + hub.names(INDEX)


def single_files(*kinds: str) -> list[str]:
    """The names of .safetensors files in the folders of these kinds and below, without those that belong to a diffusers folder."""
    found = set()
    for top in (folder for kind in kinds for folder in host().model_folders(kind)):
        for folder, below, names in os.walk(top, followlinks=True):
            if INDEX in names:
                below.clear()
                continue
            below[:] = [name for name in below if not name.startswith(".")]
            found |= {(Path(folder) / name).relative_to(top).as_posix() for name in names
                      if name.endswith(SUFFIX) and not name.startswith(".")}
    return sorted(found)


# -- what a diffusers folder holds ----------------------------------------------------------------------------------------
def index(folder: Path) -> dict:
    """Its model_index.json. Raises `ValueError` or `OSError` where that is none."""
    found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def pipeline_class(folder: Path) -> str | None:
    """The class that its model_index.json names; None where that is damaged, or names none."""
    try:
        name = index(folder).get("_class_name")
    except (ValueError, OSError):
        return None
    return name if isinstance(name, str) else None


def weights_missing(folder: Path, component: str) -> str | None:
    """What is missing of a component's weights, or damaged, in words; None where all is there, or it has none."""
    value = index(folder)[component]
    if component == "safety_checker" or _WITHOUT_WEIGHTS.search(str(value[1])):  # no policy takes the former
        return None
    inside = folder / component
    files = set(inside.glob(f"*{SUFFIX}"))
    plain = any(not _is_half(file.name) for file in files)
    for listing in inside.glob(f"*{SUFFIX}.index*.json"):
        if plain and _is_half(listing.name):
            continue  # what is loaded is the other
        try:
            files |= {inside / name for name in json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, OSError, KeyError, TypeError, AttributeError):
            return f"{listing} is damaged; copy or download it again"
    if not files:
        return f"{inside} has no {SUFFIX} file"
    for path in sorted(files):
        if not path.is_file():
            return f"{path} is missing"
        try:
            headers.read(path)
        except RunError as error:
            return str(error)
    return None


def _is_half(name: str) -> bool:
    """As diffusers names the files of weights in float16: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, ….index.fp16.json."""
    return re.search(rf"\.{HALF}[.-]", name) is not None


def variant(folder: Path, given: Collection[str] = ()) -> str | None:
    """`HALF` where some component, none of the given ones, has its weights in files of that variant alone; what diffusers is to be told."""
    for component in set(components(folder)) - {"safety_checker", *given}:
        names = [file.name for file in (folder / component).glob(f"*{SUFFIX}")]
        if names and all(map(_is_half, names)):
            return HALF
    return None


def components(folder: Path) -> list[str]:
    """The names of a folder's components."""
    return [name for name, value in index(folder).items() if isinstance(value, list) and value and value[0]]
