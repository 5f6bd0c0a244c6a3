"""Checkpoints: the whole state of a learner, one safetensors file each."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from ..workflow.host import host

KEPT = 2


def path_of(folder: Path, iterations: int) -> Path:
    return folder / f"{iterations:07d}.safetensors"


def save(folder: Path, iterations: int, tensors: dict[str, Tensor], micro_batch: int, kept: int | None = KEPT) -> Path:
    """The last `kept` are kept (None: all). Raises `OSError` (a full disk), with the former ones untouched."""
    path = path_of(folder, iterations)
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"iterations": str(iterations), "micro_batch": str(micro_batch)})
    for old in sorted(folder.glob("*.safetensors"))[:-kept] if kept else ():
        old.unlink()
    return path


def newest(folder: Path) -> tuple[int, dict[str, Tensor], int] | None:
    """(iterations, tensors, micro-batch size) of the newest readable checkpoint, or None; a damaged one is named and passed over."""
    paths = sorted(folder.glob("*.safetensors"), reverse=True)
    return next((found for path in paths if (found := load(path, "; the one before is used"))), None)


def load(path: Path, otherwise: str = "") -> tuple[int, dict[str, Tensor], int] | None:
    """The same of one checkpoint; a damaged one is named, and what is done `otherwise`."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            return int(header["iterations"]), {name: file.get_tensor(name) for name in file.keys()}, int(header["micro_batch"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        host().say(f"checkpoint {path} is damaged ({error}){otherwise}")
        return None
