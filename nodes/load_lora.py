from __future__ import annotations

from comfy_dancegrpo import headers
from comfy_dancegrpo import lora as loras

from . import wires


class LoadLora:
    TITLE = "Load Policy LoRA"
    DESCRIPTION = "Brings a LoRA into the graph, ours or another's: to evaluate, compare or apply it without training, or for Loop Start to go on from."
    SEARCH_ALIASES = ["lora loader", "evaluate", "compare", "safetensors", "kohya"]
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
            "lora": (loras.available(), {"tooltip": "RUN/lora/FILE of a run in the output folder, the newest first, or a file in the LoRA folders, "
                                                  "also in the names of diffusers, ComfyUI or kohya."}),
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

        path = loras.find(lora)
        loaded, told = files.load(path, policy), headers.metadata(path)
        if "dancegrpo.reward" in told:
            host().say(f"Load Policy LoRA: {lora}: {loaded.iterations} iterations, reward {told['dancegrpo.reward']}")
        if loaded.policy != policy.name:
            host().say(f"Load Policy LoRA: {lora} was trained on {loaded.policy!r}, and is loaded for {policy.name!r}")
        return (loaded,)
