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
from ..workflow.host import host
from .adapter import Adapter, LoraSettings, LoraSnapshot
from .layouts import layout

_MATRICES = (".lora_A.weight", ".lora_B.weight")
_HEADER = "dancegrpo."


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


def save(snapshot: LoraSnapshot, path: Path, metadata: dict[str, str] | None = None) -> list[Path]:
    """Writes `contents(snapshot)` to the path, or of several files to paths beside it; tells the host, and returns them."""
    return [_write(part, snapshot, path.with_name(path.stem + suffix + path.suffix), {"dancegrpo.expert": suffix.strip("_")} | (metadata or {}))
            for suffix, part in contents(snapshot).items()]


def _write(tensors: dict[str, Tensor], snapshot: LoraSnapshot, path: Path, metadata: dict[str, str]) -> Path:
    header = {
        "format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": path.stem,
        "dancegrpo.policy": snapshot.policy, "dancegrpo.iterations": str(snapshot.iterations),
        "dancegrpo.averaged": str(snapshot.averaged).lower(), "dancegrpo.rank": str(snapshot.settings.rank),
        "dancegrpo.alpha": str(snapshot.settings.alpha), **metadata,
    }
    with replacing(path) as beside:
        save_file(tensors, beside, metadata=header)
    host().lora_saved(path)
    return path


def load(path: Path, policy: Policy) -> LoraSnapshot:
    """A file that `save` wrote, as an adapter on the smallest of the policy's `lora_targets` that holds all of the file's modules.

    Of a model with two experts either of the two files stands for both.
    A module of that choice that the file lacks gets zeros, and so does what a module's lower rank leaves free. alpha is the rank, since the
    file has it folded into lora_B. The prompts that it was trained on and the run's folder are not in the file.

    Raises:
        RunError: it is no such file, or is damaged, or has weights that find no place in the denoiser.
    """
    parts, header = _parts(path, policy)
    names = layout(policy.lora_layout)
    try:
        parts = {suffix: names.from_file({key: value.float() for key, value in stored.items()}) for suffix, stored in parts.items()}
    except KeyError as error:
        raise _unfit(path, f"there is no place for {error.args[0]!r}") from None
    found = names.join(parts) if hasattr(names, "join") else parts[""]
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
    return LoraSnapshot(tensors, settings, header["policy"], policy.lora_layout, int(header["iterations"]), header["averaged"] == "true", None,
                        source=path)


def _parts(path: Path, policy: Policy) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The weights of the file and of those that `save` wrote with it, by what their names end in, and the file's header as `_read` gives it."""
    stored, header = _read(path)
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
        parts[suffix], told = (stored, header) if file == path else _read(file)
        if file != path and {**told, "expert": expert} != header:
            raise RunError(f"{path} and {file} were not saved together, accepted: the two that Save LoRA wrote at once")
    return parts, header


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's weights, and of its header what `save` wrote, without "dancegrpo."."""
    try:
        with safe_open(path, framework="pt") as file:
            stored, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged, or is no safetensors file: {' '.join(str(error).split())}") from error
    told = {key.removeprefix(_HEADER): value for key, value in header.items() if key.startswith(_HEADER)}
    if not stored or not {"policy", "averaged"} <= told.keys() or not told.get("iterations", "").isdecimal():
        raise RunError(f"{path} holds no LoRA of this program, accepted: a file that Save LoRA wrote")
    return stored, told


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
