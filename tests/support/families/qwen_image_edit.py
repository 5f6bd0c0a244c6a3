import contextlib
from functools import partial
from unittest import mock

import numpy as np
import PIL.Image
from comfy_dancegrpo.policies.qwen_image import PictureProcessor
from comfy_dancegrpo.prompts import Prompt, Reference
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny

from . import PROMPTS, Case
from .qwen_image import parts


def saveable(pipeline_class, **transformer):
    processor = PictureProcessor(Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 112**2}), tiny.qwen_tokenizer())
    pipeline = pipeline_class(**parts(**transformer), processor=processor)
    pipeline.register_to_config(processor=("transformers", "Qwen2VLProcessor"))  # as published folders name it
    return pipeline


def picture(seed: int, width: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, width, 3), dtype=np.uint8))


# of two shapes: the one is seen in 96x96 pixels, the other in 128x64
PICTURED = tuple(Prompt(text, Reference(f"picture {i}", str(i), partial(picture, i, width)))
                 for i, (text, width) in enumerate(zip(PROMPTS, (6, 12), strict=True)))


@contextlib.contextmanager
def small_references():
    """References of 1/128 of the area: the pipelines' own million pixels would be 4096 tokens."""
    with contextlib.ExitStack() as patches:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            own = module.calculate_dimensions
            patches.enter_context(mock.patch.object(module, "calculate_dimensions", lambda area, ratio, own=own: own(area / 128, ratio)))
        yield


def draw(pipeline, asked):
    """One picture a call."""
    return np.concatenate([
        pipeline(image=prompt.picture.image(), prompt=str(prompt), negative_prompt=" ", latents=asked.latents[i: i + 1], height=asked.size.height,
                 width=asked.size.width, num_inference_steps=asked.steps, true_cfg_scale=asked.guidance_scale, output_type="np").images
        for i, prompt in enumerate(asked.prompts)])


def edit():
    return saveable(QwenImageEditPipeline)


def edit_plus():
    """Of the kind of 2511: the reference has a time of its own, 0."""
    return saveable(QwenImageEditPlusPipeline, zero_cond_t=True)


CASES = [Case("qwen-image-edit", edit, "qwen_image", draw=draw, prompts=PICTURED, within=small_references),
         Case("qwen-image-edit-plus", edit_plus, "qwen_image", draw=draw, prompts=PICTURED, within=small_references)]
