"""LoRA: injection (peft), snapshots, the one file that every loader reads, and where such files are found. Importing this imports no torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import RunError
from ..workflow.host import host, inside

SUFFIX = ".safetensors"
ALL_WEIGHTS = "all weights (no LoRA)"  # in the place of a choice of `lora_targets`: full fine-tuning


def available() -> list[str]:
    """Names that `find` takes: `RUN/lora/FILE.safetensors` of the output folder's runs, the newest first, then the files of the LoRA folders."""
    made = [path for path in host().output_folder.glob(f"*/lora/*{SUFFIX}") if path.is_file()]
    made.sort(key=lambda path: (-path.stat().st_mtime_ns, path))
    runs = [path.relative_to(host().output_folder).as_posix() for path in made]
    return runs + [name for name in host().list_models("loras") if name.endswith(SUFFIX) and name not in runs]


def find(name: str) -> Path:
    """The file of a LoRA. Raises `RunError` naming the folders searched."""
    if not name.endswith(SUFFIX):
        raise RunError(f'input "lora": found {name!r}, accepted: a {SUFFIX} file of the LoRA folders, or RUN/lora/FILE{SUFFIX} of a run')
    for path in (inside(host().output_folder, name), host().find_model("loras", name)):
        if path and path.is_file():
            return path
    searched = ", ".join(str(folder) for folder in (host().output_folder, *host().model_folders("loras")))
    raise RunError(f'input "lora": found {name!r}, which is in none of the folders searched ({searched}); '
                   "RUN/lora/RUN.safetensors is made by the run of that name")


def problem(name: str) -> str | None:
    """The line about a name that `find` does not take; None where it does."""
    try:
        find(name)
    except RunError as error:
        return str(error)
    return None
