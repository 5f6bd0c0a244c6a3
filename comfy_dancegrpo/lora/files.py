"""The LoRA file: the same keys for diffusers and ComfyUI, full strength in both."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from ..workflow.host import host
from .adapter import LoraSnapshot
from .layouts import layout


def tensors(snapshot: LoraSnapshot) -> dict[str, Tensor]:
    """The file's content in the names of the snapshot's layout, float32.

    alpha / rank is folded into lora_B and no alpha key is written: loaders differ in how they read one, and none is read as 1.
    """
    scale = snapshot.settings.alpha / snapshot.settings.rank
    folded = {name: value * scale if ".lora_B." in name else value for name, value in snapshot.tensors.items()}
    return {name: value.contiguous() for name, value in layout(snapshot.layout).to_file(folded).items()}


def save(snapshot: LoraSnapshot, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors(snapshot)`, and tells the host."""
    header = {
        "format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": path.stem,
        "dancegrpo.policy": snapshot.policy, "dancegrpo.iterations": str(snapshot.iterations),
        "dancegrpo.averaged": str(snapshot.averaged).lower(), "dancegrpo.rank": str(snapshot.settings.rank),
        "dancegrpo.alpha": str(snapshot.settings.alpha), **(metadata or {}),
    }
    with replacing(path) as beside:
        save_file(tensors(snapshot), beside, metadata=header)
    host().lora_saved(path)
