import torch
from comfy_dancegrpo.embedded import POLICY
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from . import Case, draw


def flux_dev():
    """Of the kind of FLUX.1-dev: dynamic shifting, and guidance as an input of the model."""
    pipeline = FluxPipeline.from_pretrained(POLICY, torch_dtype=torch.float32)
    torch.manual_seed(0)
    pipeline.transformer = FluxTransformer2DModel.from_config({**pipeline.transformer.config, "guidance_embeds": True})
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, shift=3.0))
    return pipeline


CASES = [
    Case("flux-dev", flux_dev, draw=lambda pipeline, asked: draw(pipeline, asked, max_sequence_length=16),
         comfyui="flux"),
]
