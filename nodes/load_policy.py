from __future__ import annotations

from comfy_dancegrpo import policies

from . import wires


class LoadPolicy:
    TITLE = "Load Policy"
    DESCRIPTION = "Loads a base model, its weights frozen. The loop attaches a fresh LoRA to it; the base itself never changes."
    SEARCH_ALIASES = ["model", "checkpoint", "flux", "diffusers"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.POLICY,)
    RETURN_NAMES = ("policy",)
    OUTPUT_TOOLTIPS = ("The base model.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "policy": wires.choice(policies.available(), "A diffusers folder in the model folders, or the embedded tiny policy."),
            "dtype": wires.choice(list(policies.DTYPES), "Of the frozen weights. The LoRA is always trained in float32."),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, policy):
        return (policy is not None and policies.problem(policy)) or True

    def load(self, policy: str, dtype: str):
        return (policies.load(policy, dtype),)
