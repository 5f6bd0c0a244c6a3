"""Names as diffusers saves them (`transformer.….lora_A.weight`), which ComfyUI reads too for SD3, FLUX, FLUX.2, Qwen-Image and Z-Image."""

from __future__ import annotations

from torch import Tensor

PREFIX = "transformer."


def to_file(tensors: dict[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def from_file(tensors: dict[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    for name in tensors:
        if not name.startswith(prefix):
            raise KeyError(name)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}
