"""Key names of LoRA files: one file each, and one line here. Importing this package imports none of them.

A layout is a module with two functions, each the other's inverse on what we train:
`to_file(tensors) -> tensors` takes `<module>.lora_A.weight` [r, in] and `….lora_B.weight` [out, r], alpha folded in, modules by
their names in diffusers' denoiser, and returns a file's content; `from_file(tensors) -> tensors` takes that content back, and
raises `KeyError` with a key that is none of this layout's. Where a model may have several denoisers, the layout has also
`split(tensors) -> {suffix of the file's name: tensors}`, its inverse `join`, and `SUFFIXES`, those of several denoisers in order; what the
first two see is then one denoiser's.
"""

from __future__ import annotations

import importlib
from types import ModuleType

LAYOUTS = ("diffusers", "hunyuan_video", "ltx", "kohya", "wan")
READ_ONLY = ("sd3",)


def layout(name: str) -> ModuleType:
    """Raises `KeyError` for a name that is not in `LAYOUTS`."""
    if name not in LAYOUTS:
        raise KeyError(name)
    return importlib.import_module(f".{name}", __name__)


def reader(name: str) -> ModuleType:
    """A module with `from_file`: a layout, or a model's own names that no file of ours has."""
    return importlib.import_module(f".{name}", __name__) if name in READ_ONLY else layout(name)
