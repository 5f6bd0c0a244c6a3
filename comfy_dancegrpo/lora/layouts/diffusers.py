"""Names as diffusers saves them (`transformer.….lora_A.weight`), which ComfyUI reads too for SD3, FLUX, Qwen-Image and Z-Image."""

from __future__ import annotations

from torch import Tensor

PREFIX = "transformer."


def to_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {PREFIX + name: value for name, value in tensors.items()}


def from_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in tensors:
        if not name.startswith(PREFIX):
            raise KeyError(name)
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}
