from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

import tiny

from . import Case, Drawing



def parts(**transformer) -> dict:
    denoiser = tiny.seeded(QwenImageTransformer2DModel, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                           num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **transformer)
    vae = tiny.seeded(AutoencoderKLQwenImage, base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
                      latents_std=[1.1, 0.9, 1.2, 1.0])
    # as published: shifted by size, exponentially, and stretched to end at 0.02
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.5,
                                                max_shift=0.9, shift_terminal=0.02, time_shift_type="exponential")
    return {"transformer": denoiser, "vae": vae, "scheduler": scheduler, "text_encoder": tiny.qwen_vl(32), "tokenizer": tiny.qwen_tokenizer()}


def draw(pipeline, asked: Drawing, **more):
    return pipeline(prompt=list(asked.prompts), negative_prompt=[" "] * len(asked.prompts), latents=asked.latents, height=asked.size.height,
                    width=asked.size.width, num_inference_steps=asked.steps, true_cfg_scale=asked.guidance_scale, output_type="np", **more).images


def qwen_image():
    return QwenImagePipeline(**parts())


CASES = [Case("qwen-image", qwen_image, "qwen_image", draw=draw),
         Case("qwen-image-unguided", qwen_image, "qwen_image", draw=draw, guidance_scale=1.0)]
