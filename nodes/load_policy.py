from __future__ import annotations

from comfy_dancegrpo import policies
from comfy_dancegrpo.policies import kernels, places
from comfy_dancegrpo.policies.quantization import KINDS, NONE
from comfy_dancegrpo.policies.quantization import problem as quantization_problem

from . import wires

OWN = "from the policy"
PARTS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "components", "transformer_2", "image_encoder")


class LoadPolicy:
    TITLE = "Load Policy"
    DESCRIPTION = "Loads a base model, its weights frozen. The loop attaches a fresh LoRA to it; the base itself never changes."
    SEARCH_ALIASES = ["model", "checkpoint", "flux", "diffusers", "safetensors"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.POLICY,)
    RETURN_NAMES = ("policy",)
    OUTPUT_TOOLTIPS = ("The base model.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        texts = [OWN, *places.single_files("text_encoders")]
        return {"required": {
            "policy": wires.choice(policies.available(), "One of the two embedded tiny policies, a diffusers folder in the model folders or in the Hugging Face "
                                                         "cache (org/name), or a single .safetensors file."),
            "dtype": wires.choice(list(policies.DTYPES), "Of the frozen weights. The LoRA is always trained in float32."),
        }, "optional": {
            "vae": wires.choice([OWN, *places.single_files("vae")], "A VAE file in place of the policy's own."),
            "text_encoder": wires.choice(texts, "A file in place of the policy's text_encoder (CLIP-L in FLUX.1 and SD3)."),
            "text_encoder_2": wires.choice(texts, "A file in place of its text_encoder_2 (T5 in FLUX.1, CLIP-G in SDXL and SD3)."),
            "text_encoder_3": wires.choice(texts, "A file in place of its text_encoder_3 (T5 in SD3)."),
            "components": wires.choice([OWN, *places.diffusers_folders()], "For a single file: the diffusers folder of its family that has the "
                                       "configurations, the tokenizers, and the weights that no file gives."),
            "prompt_cache": wires.choice(list(policies.PROMPT_CACHES), "Where encoded prompts are kept. disk: in the output folder too, for the next run."),
            "guidance_scale_2": wires.number(0.0, 0.0, 100.0, "Of Wan 2.2 A14B's expert of low noise, wherever the policy draws: its makers take 4 for the first "
                                                              "expert and 3 for this. 0 takes guidance_scale for both; other models have no second expert.", 0.1),
            "quantization": wires.choice(list(KINDS), "Of the denoiser's frozen weights, by a package of that name: half the memory of bfloat16 or, "
                                         "with nf4, a quarter. bitsandbytes needs a GPU. Only a LoRA can be trained on it."),
            "attention_backend": wires.choice(list(kernels.BACKENDS), "By which kernels the denoiser computes attention, of diffusers' names. default: torch's own choice. "
                                              "flash, _flash_3 and xformers come in packages of their own, and want a GPU and a half precision."),
            "compile": ("BOOLEAN", {"default": False, "tooltip": "torch.compile of the blocks that the denoiser repeats: faster calls on a GPU, "
                                                                "and a wait at the first ones. It belongs to the run, since compiled kernels round otherwise."}),
            "transformer_2": wires.choice([OWN, *places.single_files(*places.FILES["transformer_2"])], "A file in place of the policy's second expert: that of low "
                                          "noise in Wan 2.2 A14B, whose expert of high noise is then the file at policy."),
            "image_encoder": wires.choice([OWN, *places.single_files(*places.FILES["image_encoder"])], "A CLIP vision file in place of the policy's image_encoder (image to video "
                                          "with Wan 2.1)."),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, policy, vae=OWN, text_encoder=OWN, text_encoder_2=OWN, text_encoder_3=OWN, components=OWN, quantization=NONE,
                        transformer_2=OWN, image_encoder=OWN):
        given = dict(zip(PARTS, (vae, text_encoder, text_encoder_2, text_encoder_3, components, transformer_2, image_encoder)))
        if quantization is not None and (line := quantization_problem(quantization)):
            return line
        if policy is None or None in given.values():  # they come over links
            return True
        return policies.problem(policy, parts_of(given)) or True

    def load(self, policy: str, dtype: str, vae=OWN, text_encoder=OWN, text_encoder_2=OWN, text_encoder_3=OWN, components=OWN, prompt_cache="memory",
             guidance_scale_2: float = 0.0, quantization=NONE, attention_backend=kernels.DEFAULT, compile: bool = False,
             transformer_2=OWN, image_encoder=OWN):
        given = dict(zip(PARTS, (vae, text_encoder, text_encoder_2, text_encoder_3, components, transformer_2, image_encoder)))
        return (policies.load(policy, dtype, parts_of(given), prompt_cache, guidance_scale_2, quantization,
                              attention_backend, compile),)


def parts_of(values: dict) -> places.Parts:
    """From the node's inputs by name."""
    return places.Parts(**{part: "" if values[part] == OWN else values[part] for part in PARTS})
