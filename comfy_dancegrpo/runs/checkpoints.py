"""Checkpoints: the whole state of a learner, one safetensors file each."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from ..workflow.host import host

KEPT = 2


def save(folder: Path, iterations: int, tensors: dict[str, Tensor], micro_batch: int) -> Path:
    """The last `KEPT` are kept. Raises `OSError` (a full disk), with the former ones untouched."""
    path = folder / f"{iterations:07d}.safetensors"
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"iterations": str(iterations), "micro_batch": str(micro_batch)})
    for old in sorted(folder.glob("*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def newest(folder: Path) -> tuple[int, dict[str, Tensor], int] | None:
    """(iterations, tensors, micro-batch size) of the newest readable checkpoint, or None; a damaged one is named and passed over."""
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                return int(header["iterations"]), {name: file.get_tensor(name) for name in file.keys()}, int(header["micro_batch"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            host().say(f"checkpoint {path} is damaged ({error}); the one before is used")
    return None
