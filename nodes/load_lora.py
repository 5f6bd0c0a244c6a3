from __future__ import annotations

from comfy_dancegrpo import lora as loras

from . import wires


class LoadLora:
    TITLE = "Load Policy LoRA"
    DESCRIPTION = "Brings a LoRA that Save LoRA wrote back into the graph, so that it can be evaluated or compared without training."
    SEARCH_ALIASES = ["lora loader", "evaluate", "compare", "safetensors"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.LORA,)
    RETURN_NAMES = ("lora",)
    OUTPUT_TOOLTIPS = ("The LoRA, for Evaluate, Apply Policy LoRA, or Loop Start to go on from.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "policy": wires.socket(wires.POLICY, "The base model that it was trained on."),
            # no default: the first of the list is the newest run's
            "lora": (loras.available(), {"tooltip": "RUN/lora/FILE of a run in the output folder, the newest first, or a file in the LoRA folders."}),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, lora):
        return (lora is not None and loras.problem(lora)) or True

    @classmethod
    def IS_CHANGED(cls, lora, policy=None):
        found = loras.find(lora).stat()
        return f"{found.st_mtime_ns} {found.st_size}"

    def load(self, policy, lora: str):
        from comfy_dancegrpo.lora import files
        from comfy_dancegrpo.workflow.host import host

        loaded = files.load(loras.find(lora), policy)
        if loaded.policy != policy.name:
            host().say(f"Load Policy LoRA: {lora} was trained on {loaded.policy!r}, and is loaded for {policy.name!r}")
        return (loaded,)
