"""Where policies and their parts are on this machine: diffusers folders, the Hugging Face cache, single files. No network is asked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import headers, hub
from ..errors import RunError
from ..workflow.host import host
from . import recognise

KINDS = ("diffusers", "checkpoints", "diffusion_models")  # model folders that are searched, in this order
FILES = {
    # components that a file of their own may give -> the model folders where it is
    "vae": ("vae",), "text_encoder": ("text_encoders",), "text_encoder_2": ("text_encoders",), "text_encoder_3": ("text_encoders",),
    "transformer_2": ("checkpoints", "diffusion_models"), "image_encoder": ("clip_vision",),
}
DENOISERS = ("transformer", "unet", "transformer_2")
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
    transformer_2: str = ""
    image_encoder: str = ""

    def files(self) -> dict[str, Path]:
        """The given files by component. Raises `RunError` for one that is nowhere."""
        return {component: _file(kinds, name, component) for component, kinds in FILES.items() if (name := getattr(self, component))}


def _file(kinds: tuple[str, ...], name: str, input: str) -> Path:
    for kind in kinds:
        if (path := host().find_model(kind, name)) and path.is_file():
            return path
    raise RunError(f'input "{input}": found {name!r}, which is in none of the folders searched ({searched(kinds)})')


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


def superfluous(folder: Path, given: Mapping[str, Path]) -> str | None:
    """The line about a given part that the policy has not; None where there is none."""
    own = components(folder)
    return next((f'input "{name}": found {file.name!r}, and the policy has no {name}; it has {", ".join(own)}'
                 for name, file in given.items() if name not in own), None)


def lacking(folder: Path, given: Mapping[str, Path], file: Path | None = None) -> str | None:
    """What no file gives of a policy, or what is given that it has not, in one line; None where nothing is. Nothing is loaded.

    file: the single file that the folder is to complete; what it holds is told by the names of its tensors.
    """
    if line := superfluous(folder, given):
        return line
    names = headers.read(file) if file else ()
    for component in components(folder):
        held = file and (component in denoisers(folder)[:1] or recognise.holds(names, component, index(folder)[component][1]))
        if component in given or held or (missing := weights_missing(folder, component)) is None:
            continue
        if file is None:
            return f'input "policy": found {folder}, and {missing}'
        return nowhere(file, component, missing)
    return None


def nowhere(file: Path, component: str, missing: str) -> str:
    """The line about a component that is neither in the policy's file nor in a folder or a file beside it."""
    way = f'a file at input "{component}", or those weights' if component in FILES else 'a diffusers folder with those weights at input "components"'
    return f'input "policy": {file} holds no {component}, and {missing}; accepted: {way}'


def denoisers(folder: Path) -> list[str]:
    """The components that are trained through: two where a model has two experts."""
    return [name for name in DENOISERS if name in components(folder)]


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
