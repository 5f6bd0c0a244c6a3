"""The headers of safetensors files: what is in them, and whether they are whole. Nothing is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RunError

_LONGEST = 100_000_000  # bytes of a header, as the safetensors library has it
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # of the floating types


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. dtype: in the words of safetensors ("F32", "BF16", ...)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Of its numbers."""
        count = 1
        for side in self.shape:
            count *= side
        return count


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises `RunError`, one line, for a file that is cut short or no safetensors file."""
    return _header(path)[0]


def metadata(path: Path) -> dict[str, Any]:
    """What its writer noted in a file. Raises as `read`."""
    return _header(path)[1]


def _header(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LONGEST:
            raise RunError(f"{path} is no safetensors file")
        text = file.read(length)
    if len(text) < length:
        raise RunError(f"{path} is cut short: it ends within its header")
    try:
        entries = json.loads(text)
        notes = dict(entries.pop("__metadata__", None) or {})
        found = {name: Stored(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise RunError(f"{path} is no safetensors file") from None
    if size < whole:
        raise RunError(f"{path} is cut short: it has {size} bytes of {whole}; copy or download it again")
    return found, notes
