"""Published weights from files, read with care: tensors alone, whole, and of the shapes that the configuration tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor

from ..errors import RunError


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a PyTorch file (of a training checkpoint those under "state_dict" or "model"), on the CPU.

    Raises `RunError` on a damaged file, and on a PyTorch file that holds more than tensors and plain values: nothing is unpickled.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file torch.load raises whatever comes of it
        raise RunError(f"{path}: it cannot be read as weights ({' '.join(str(error).split())[:200]})") from None
    stored = stored if isinstance(stored, dict) else {}
    stored = next((stored[name] for name in ("state_dict", "model") if isinstance(stored.get(name), dict)), stored)
    tensors = {name.removeprefix("module."): value for name, value in stored.items() if isinstance(value, Tensor)}
    if not tensors:
        raise RunError(f"{path}: found no weights in it")
    return tensors


def part(tensors: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """Those whose names begin so, without it. Raises `RunError`, naming the file, where there are none."""
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not found:
        raise RunError(f"{path}: found no {prefix}… among its {len(tensors)} tensors")
    return found


def fill(make: Callable[[], torch.nn.Module], tensors: dict[str, Tensor], path: Path) -> torch.nn.Module:
    """What `make` builds, with these weights, as they are stored. Raises `RunError`, naming the file, where names or shapes are not its own."""
    with init_empty_weights():
        module = make()
    wanted = module.state_dict()
    if missing := wanted.keys() - tensors.keys():
        raise RunError(f"{path}: it lacks {len(missing)} of {len(wanted)} tensors, such as {min(missing)}")
    if more := tensors.keys() - wanted.keys():
        raise RunError(f"{path}: it has {len(more)} tensors more than {len(wanted)}, such as {min(more)}")
    for name, value in wanted.items():
        if tensors[name].shape != value.shape:
            raise RunError(f"{path}: {name} is {list(tensors[name].shape)}, accepted: {list(value.shape)}, as the configuration tells")
    module.load_state_dict(tensors, assign=True)
    return module
