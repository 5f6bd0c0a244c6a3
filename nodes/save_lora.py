from __future__ import annotations

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.runs.folder import checked_name, name_problem
from comfy_dancegrpo.workflow.host import host

from . import wires

SUFFIX = ".safetensors"


class SaveLora:
    TITLE = "Save LoRA"
    DESCRIPTION = "Writes the LoRA as one file that ComfyUI's LoRA loader and diffusers' load_lora_weights both take, at full strength; " \
                  "of a full fine-tuning the weights."
    SEARCH_ALIASES = ["export", "safetensors"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "lora": wires.socket(wires.LORA, "From Loop End."),
            "filename": ("STRING", {"default": "", "tooltip": "Of the file, in the run's lora folder; empty takes the run's name."}),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, filename):
        return (filename and name_problem(filename.removesuffix(SUFFIX), "filename")) or True

    def save(self, lora, filename: str):
        from comfy_dancegrpo.lora import files

        if lora.folder is None:
            raise RunError('input "lora": found one that was loaded from a file, accepted: one from Loop End')
        name = checked_name(filename.removesuffix(SUFFIX) or lora.folder.name, "filename")
        path = lora.folder / "lora" / f"{name}{SUFFIX}"
        paths = [str(written) for written in files.save(lora, path)]
        host().say(f"{lora.kind}{' (moving average)' if lora.averaged else ''} after {lora.iterations} iterations: {' and '.join(paths)}")
        return {"ui": {"text": paths}}
