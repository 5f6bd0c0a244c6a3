import numpy as np
from diffusers import FluxKontextPipeline

from . import Case, pictured
from .flux import flux_dev


def flux_kontext():
    return FluxKontextPipeline(**{**flux_dev().components, "image_encoder": None, "feature_extractor": None})


def draw(pipeline, asked):
    """One picture a call, seen in the size of what is drawn."""
    height, width = asked.size.height, asked.size.width
    return np.concatenate([
        pipeline(image=pipeline.image_processor.resize(prompt.picture.image(), height, width), prompt=str(prompt), latents=asked.latents[i: i + 1],
                 height=height, width=width, max_area=height * width, num_inference_steps=asked.steps, guidance_scale=asked.guidance_scale,
                 output_type="np", max_sequence_length=16, _auto_resize=False).images
        for i, prompt in enumerate(asked.prompts)])


CASES = [
    Case("flux-kontext", flux_kontext, draw=draw, prompts=pictured(), comfyui="flux"),
]
