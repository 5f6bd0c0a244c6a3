"""The LoRA file: the same keys for diffusers and ComfyUI, full strength in both."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import processes
from ..atomic import replacing
from ..errors import RunError
from ..policies.base import Policy
from ..runs import notes
from ..workflow.host import host
from . import families, foreign
from .adapter import Adapter, LoraSettings, LoraSnapshot
from .full import FullSnapshot
from .layouts import layout
from .layouts.wan import LOW

_MATRICES = (".lora_A.weight", ".lora_B.weight")
_HEADER = "dancegrpo."
_EXPERT = re.compile(r"(?:^|[^a-zA-Z])(high|low)(?=[^a-zA-Z]|noise|$)", re.IGNORECASE)  # in the names of files


def contents(snapshot: LoraSnapshot) -> dict[str, dict[str, Tensor]]:
    """What the LoRA's files hold, by what their names end in: one of "", or of a model with two experts one for each.

    In the names of the snapshot's layout, float32.

    alpha / rank is folded into lora_B and no alpha key is written: loaders differ in how they read one, and none is read as 1.
    """
    scale = snapshot.settings.alpha / snapshot.settings.rank
    folded = {name: value * scale if ".lora_B." in name else value for name, value in snapshot.tensors.items()}
    names = layout(snapshot.layout)
    parts = names.split(folded) if hasattr(names, "split") else {"": folded}
    return {suffix: {name: value.contiguous() for name, value in names.to_file(part).items()} for suffix, part in parts.items()}


def save(snapshot: LoraSnapshot | FullSnapshot, path: Path, metadata: dict[str, str] | None = None) -> list[Path]:
    """Writes `contents(snapshot)` to the path, or of several files to paths beside it; tells the host, and returns them.

    Of a full fine-tuning: the denoisers' weights, in a folder of that name in the layout of diffusers.
    """
    if isinstance(snapshot, FullSnapshot):
        return snapshot.save(path.with_suffix(""), _header(snapshot, path.stem) | (metadata or {}))
    return [_write(part, snapshot, path.with_name(path.stem + suffix + path.suffix), {"dancegrpo.expert": suffix.strip("_")} | (metadata or {}))
            for suffix, part in contents(snapshot).items()]


def _write(tensors: dict[str, Tensor], snapshot: LoraSnapshot, path: Path, metadata: dict[str, str]) -> Path:
    strength = {"dancegrpo.rank": str(snapshot.settings.rank), "dancegrpo.alpha": str(snapshot.settings.alpha)}
    with replacing(path) as beside:
        save_file(tensors, beside, metadata=_header(snapshot, path.stem) | strength | metadata)
    host().lora_saved(path)
    return path


def _header(snapshot: LoraSnapshot | FullSnapshot, title: str) -> dict[str, str]:
    """modelspec's fields (Stability AI's ModelSpec 1.0.0) and ours."""
    return {
        "format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": title, "modelspec.implementation": "diffusers",
        "dancegrpo.policy": snapshot.policy, "dancegrpo.iterations": str(snapshot.iterations), "dancegrpo.averaged": str(snapshot.averaged).lower(),
        **_architecture(snapshot), **notes.of(snapshot.folder),
    }


def _architecture(snapshot: LoraSnapshot | FullSnapshot) -> dict[str, str]:
    """Of a LoRA whose layers are those of one published family alone."""
    if isinstance(snapshot, FullSnapshot):
        return {}
    widths = {_module(name).removeprefix(LOW): value.shape[1] for name, value in snapshot.tensors.items() if ".lora_A." in name}
    found = families.recognise(widths)
    return {"modelspec.architecture": f"{found[0].architecture}/lora"} if len(found) == 1 else {}


def load(path: Path, policy: Policy) -> LoraSnapshot:
    """A file that `save` wrote, or one of others in any of the names that `foreign` reads, as an adapter on the smallest of the policy's
    `lora_targets` that holds all of the file's modules.

    Of a model with two experts either of two files stands for both; one file of others, whose name tells neither high nor low, is for both.
    A module of that choice that the file lacks gets zeros, and so does what a module's lower rank leaves free. alpha is the rank, since the
    file has it folded into lora_B, or it is done here. The prompts that it was trained on and the run's folder are not in the file.

    Raises:
        RunError: it holds no LoRA, or is damaged, or has weights that find no place in the denoiser.
    """
    stored, header = read(path)
    told = _ours(path, header)
    found = _own(path, stored, told, policy) if told else _others(path, stored, header, policy)
    targets, known = _targets({_module(name) for name in found}, policy)
    if lost := sorted(name for name in found if not name.endswith(_MATRICES) or _module(name) not in known):
        raise _unfit(path, f"there is no place for {lost[0]!r}")
    for module in sorted({_module(name) for name in found}):
        a, b = (found.get(module + matrix) for matrix in _MATRICES)
        if a is None or b is None or min(a.ndim, b.ndim) < 2 or a.shape[0] != b.shape[1]:
            raise RunError(f"the LoRA in {path} is damaged: lora_A and lora_B of {module} do not belong together")
    rank = max(value.shape[0] for name, value in found.items() if name.endswith(_MATRICES[0]))
    settings = LoraSettings(rank, float(rank), targets)
    with processes.outside_inference_mode():
        tensors = {name: _placed(path, name, found.get(name), shape) for name, shape in _shapes(policy, settings).items()}
    return LoraSnapshot(tensors, settings, told.get("policy", policy.name), policy.lora_layout, int(told.get("iterations", 0)),
                        told.get("averaged") == "true", None, source=path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and metadata. Raises `RunError` where it is damaged, or empty."""
    try:
        with safe_open(path, framework="pt") as file:
            stored, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged, or is no safetensors file: {' '.join(str(error).split())}") from error
    if not stored:
        raise RunError(f"{path} holds no LoRA: it has no tensors")
    return stored, header


def _ours(path: Path, header: dict[str, str]) -> dict[str, str]:
    """What `save` wrote in a header, without "dancegrpo."; nothing of a file of others."""
    told = {key.removeprefix(_HEADER): value for key, value in header.items() if key.startswith(_HEADER)}
    if told and (not {"policy", "averaged"} <= told.keys() or not told.get("iterations", "").isdecimal()):
        raise RunError(f"the LoRA in {path} is damaged: its header is not as Save LoRA writes it")
    return told


def _own(path: Path, stored: dict[str, Tensor], told: dict[str, str], policy: Policy) -> dict[str, Tensor]:
    """The weights of a file that `save` wrote, and of the other that it wrote with it, in diffusers' names."""
    parts = _parts(path, stored, told, policy)
    names = layout(policy.lora_layout)
    try:
        parts = {suffix: names.from_file({key: value.float() for key, value in stored.items()}) for suffix, stored in parts.items()}
    except KeyError as error:
        raise _unfit(path, f"there is no place for {error.args[0]!r}") from None
    return names.join(parts) if hasattr(names, "join") else parts[""]


def _parts(path: Path, stored: dict[str, Tensor], header: dict[str, str], policy: Policy) -> dict[str, dict[str, Tensor]]:
    """The weights of the file and of those that `save` wrote with it, by what their names end in."""
    suffixes = layout(policy.lora_layout).SUFFIXES if len(policy.denoisers) > 1 else ("",)
    expert = header.get("expert", "")
    own = f"_{expert}" if expert else ""
    if own not in suffixes:
        raise _unfit(path, f"it is of {f'the expert {expert} alone' if expert else 'a model of one expert'}, and the policy has {len(suffixes)}")
    parts = {}
    for suffix in suffixes:
        file = path if suffix == own else path.with_name(path.stem.removesuffix(own) + suffix + path.suffix)
        if not file.is_file() or not path.stem.endswith(own):
            ends = " and ".join(suffix + path.suffix for suffix in suffixes)
            raise RunError(f"the LoRA in {path} is of the expert {expert} alone, and its other half is not at {file}; accepted: two files in one "
                           f"folder, as Save LoRA wrote them, whose names end in {ends}")
        parts[suffix] = stored
        if file != path:
            parts[suffix], other = read(file)
            if {**_ours(file, other), "expert": expert} != header:
                raise RunError(f"{path} and {file} were not saved together, accepted: the two that Save LoRA wrote at once")
    return parts


def _others(path: Path, stored: dict[str, Tensor], header: dict[str, str], policy: Policy) -> dict[str, Tensor]:
    """The weights of a file that others made, in diffusers' names. Says what of it is left out."""
    family = families.of_pipeline(policy.pipeline_class.__name__)
    lora = foreign.of_file(path, stored, header)
    found = foreign.as_family(path, lora, family)
    if len(policy.denoisers) == 1 or any(name.startswith(LOW) for name in found):
        return found
    return _experts(path, found, family)


def _experts(path: Path, found: dict[str, Tensor], family: families.Family) -> dict[str, Tensor]:
    """For both experts: of the file and of the one beside it whose name says high for low or low for high; without either word for both alike."""
    match = _EXPERT.search(path.stem)
    if not match:
        host().say(f"{path.name} is for one model, and the policy has two experts: it is taken for both; a file whose name says high or low "
                   "is for that one alone")
        return found | {LOW + name: value for name, value in found.items()}
    said = match[1]
    other = {"high": "low", "low": "high"}[said.lower()]
    beside = path.with_name(path.stem[:match.start(1)] + (other.upper() if said.isupper() else other.title() if said[0].isupper() else other)
                            + path.stem[match.end(1):] + path.suffix)
    parts = {said.lower(): found}
    if beside.is_file():
        parts[other] = foreign.as_family(beside, foreign.of_file(beside, *read(beside)), family)
    else:
        host().say(f"{path.name} is for the expert of {said.lower()} noise, and {beside.name} is not beside it: the other expert is left as it is")
    return parts.get("high", {}) | {LOW + name: value for name, value in parts.get("low", {}).items()}


def _unfit(path: Path, why: str) -> RunError:
    return RunError(f"the LoRA in {path} does not fit this policy: {why}")


def _module(name: str) -> str:
    return name.rpartition(".lora_")[0]


def _targets(modules: set[str], policy: Policy) -> tuple[str, set[str]]:
    """The choice of `lora_targets` that holds most of these modules (the smallest of several), and all modules that it holds."""
    names = [(prefix, name) for prefix, denoiser in policy.denoisers.items() for name, _ in denoiser.named_modules()]
    held = {targets: {prefix + name for prefix, name in names if re.fullmatch(pattern, name)} for targets, pattern in policy.lora_targets.items()}
    best = min(held, key=lambda targets: (len(modules - held[targets]), len(held[targets])))
    return best, held[best]


def _shapes(policy: Policy, settings: LoraSettings) -> dict[str, torch.Size]:
    """Of an adapter's parameters, by name."""
    adapter = Adapter(policy, settings)
    try:
        return {name: p.shape for name, p in adapter.parameters.items()}
    finally:
        adapter.remove()


def _placed(path: Path, name: str, value: Tensor | None, shape: torch.Size) -> Tensor:
    """A parameter of this shape that begins with the value, its other ranks zero."""
    whole = torch.zeros(shape)
    if value is not None:
        axis = 0 if name.endswith(_MATRICES[0]) else 1
        part = whole.narrow(axis, 0, value.shape[axis])
        if part.shape != value.shape:
            raise _unfit(path, f"{name} is {list(value.shape)} in the one and {list(part.shape)} in the other")
        part.copy_(value)
    return whole
