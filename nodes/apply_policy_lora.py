from __future__ import annotations

from comfy_dancegrpo.errors import RunError

from . import wires


class ApplyPolicyLora:
    TITLE = "Apply Policy LoRA"
    DESCRIPTION = "Patches a model of ComfyUI with the LoRA just trained, so that its own samplers draw with it. Needs ComfyUI."
    SEARCH_ALIASES = ["lora loader", "compare", "model patch"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = ("MODEL", "CLIP")
    RETURN_NAMES = ("model", "clip")
    OUTPUT_TOOLTIPS = ("A patched copy; the model that came in stays as it was.", "The same of the CLIP; nothing where none was linked.")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "model": wires.socket("MODEL", "Of the same family as the policy that was trained."),
            "lora": wires.socket(wires.LORA, "From Loop End, or Load Policy LoRA."),
            "strength": wires.number(1.0, -20.0, 20.0, "1 is the policy as it was trained, 0 the base model."),
        }, "optional": {
            "clip": wires.socket("CLIP", "Passed through, and patched where the LoRA has weights for it."),
            "expert": wires.choice(["high_noise", "low_noise"], "Which of a Wan 2.2 A14B's two models this one is; without effect elsewhere."),
        }}

    def apply(self, model, lora, strength: float, clip=None, expert="high_noise"):
        from comfy_dancegrpo.lora import files, full

        try:
            from .comfy_host import apply_lora, apply_weights
        except ImportError as error:
            raise RunError("a MODEL is ComfyUI's, and there is no ComfyUI here; run the graph there, or with --comfyui") from error
        if isinstance(lora, full.FullSnapshot):
            return apply_weights(model, lora.parts()[-1 if expert == "low_noise" else 0], strength), clip
        parts = files.contents(lora)
        return apply_lora(model, clip, parts.get("", parts.get(f"_{expert}")), strength)
