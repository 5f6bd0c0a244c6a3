from __future__ import annotations

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.host import host

from . import wires


class Sample:
    TITLE = "Sample"
    DESCRIPTION = "Draws with a policy, with its LoRA where one is linked, by the model's own pipeline and scheduler."
    SEARCH_ALIASES = ["generate", "draw", "text to image", "text to video"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("Prompt after prompt: pictures as one batch, videos as a list, one for each.",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "sample"
    EVERY_PROCESS = True  # the weights may be spread over them

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "policy": wires.socket(wires.POLICY, "From Load Policy."),
            "prompts": wires.socket(wires.PROMPTS, "From Prompt Set."),
            "steps": wires.integer(28, 1, 1000, "Denoising steps."),
            "guidance_scale": wires.number(3.5, 0.0, 100.0, "The model's own guidance; without effect where it has none.", 0.1),
            "width": wires.integer(720, 16, 8192, "Pixels.", 8),
            "height": wires.integer(720, 16, 8192, "Pixels.", 8),
            "frames": wires.integer(1, 1, 4096, "Of a video; 1 draws a picture."),
            "noise_seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": False,
                                   "tooltip": "Of the first sample's noise; the next sample of a prompt takes the next number."}),
            "samples_per_prompt": wires.integer(1, 1, 1024, "Pictures or videos for each prompt."),
        }, "optional": {"lora": wires.socket(wires.LORA, "From Loop End or Load Policy LoRA; nothing draws with the base model.")}}

    def sample(self, policy, prompts, steps, guidance_scale, width, height, frames, noise_seed, samples_per_prompt, lora=None):
        import contextlib

        import torch

        from comfy_dancegrpo import processes
        from comfy_dancegrpo.grpo.protocol import Size
        from comfy_dancegrpo.lora.adapter import applied, bare
        from comfy_dancegrpo.runs.draw import draw

        def tick(done: int, total: int) -> None:
            processes.check_interrupt()
            host().progress(done, total)

        host().load(policy)
        try:
            with processes.outside_inference_mode(), contextlib.ExitStack() as stack:
                stack.enter_context(bare(policy) if lora is None else applied(policy, lora))
                made = list(draw(policy, prompts.prompts, Size(height, width, frames), steps, guidance_scale, noise_seed,
                                 samples_per_prompt, tick))
        except ValueError as error:
            raise RunError(str(error)) from error
        return ([torch.stack(made)] if frames == 1 else made,)
