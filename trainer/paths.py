"""Where models are: `--models DIR`, and ComfyUI's extra_model_paths.yaml read as ComfyUI reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from comfy_dancegrpo.errors import WorkflowError

_RENAMED = {"unet": "diffusion_models", "clip": "text_encoders"}  # old kinds that ComfyUI still reads


class ModelPaths:
    """The folders of each kind of model, best first; `models/KIND` where nothing else was said."""

    def __init__(self, models: Path):
        self.models = models
        self._folders: dict[str, list[Path]] = {}

    def folders(self, kind: str) -> list[Path]:
        """The folders of a kind, by its present name or an old one."""
        kind = _RENAMED.get(kind, kind)
        return list(self._folders.get(kind, [self.models / kind, *(self.models / old for old, new in _RENAMED.items() if new == kind)]))

    def add(self, kind: str, folder: Path, first: bool = False) -> None:
        """Adds a folder last, or `first`; one that is there already stays where it is, unless it is to be first."""
        known = self.folders(kind)
        if first:
            known = [folder, *(k for k in known if k != folder)]
        elif folder not in known:
            known.append(folder)
        self._folders[_RENAMED.get(kind, kind)] = known

    def read(self, file: Path) -> None:
        """Adds what an extra_model_paths.yaml names. Raises WorkflowError, one line, for a file that is not one."""
        for section, entries in _parse(file).items():
            if entries is None:
                continue
            if not isinstance(entries, dict):
                raise WorkflowError(f"{file}: section {section!r}: found {entries!r}, accepted: lines of 'kind: folder'")
            base = _base(entries.get("base_path"), file)
            for kind, value in entries.items():
                if kind in ("base_path", "is_default"):
                    continue
                if not isinstance(value, str):
                    raise WorkflowError(f"{file}: section {section!r}: {kind}: found {value!r}, accepted: a folder, or one a line")
                for line in filter(None, value.split("\n")):
                    self.add(kind, Path(os.path.normpath(base / line)), first=bool(entries.get("is_default")))


def _base(base_path: str | None, file: Path) -> Path:
    """What a section's folders are relative to; without a base_path, the file's own folder."""
    return Path(os.path.abspath(file)).parent / os.path.expandvars(os.path.expanduser(base_path or ""))


def _parse(file: Path) -> dict[str, Any]:
    import yaml

    try:
        parsed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkflowError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise WorkflowError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if parsed is not None and not isinstance(parsed, dict):
        raise WorkflowError(f"{file}: found {type(parsed).__name__}, accepted: sections of 'kind: folder' lines")
    return parsed or {}
