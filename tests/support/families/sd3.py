from comfy_dancegrpo.grpo.protocol import Size
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

import tiny

from . import Case, draw


def parts(scheduler, **transformer) -> StableDiffusion3Pipeline:
    denoiser = tiny.seeded(
        SD3Transformer2DModel, sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=24, **transformer)
    return StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=scheduler, vae=tiny.autoencoder(),
        text_encoder=tiny.clip_text(16, projection=16), tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=tiny.clip_text(16, projection=16, seed=1), tokenizer_2=tiny.clip_tokenizer(),
        text_encoder_3=tiny.t5_encoder(64), tokenizer_3=tiny.t5_tokenizer())


def sd3():
    """Of the kind of SD3 medium: one constant shift."""
    return parts(FlowMatchEulerDiscreteScheduler(shift=3.0))


def sd35():
    """Of the kind of SD3.5 medium: a second attention in the first layers, normalised queries and keys; shifted by size."""
    return parts(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16),
                 qk_norm="rms_norm", dual_attention_layers=(0,))


def sd3_without_t5():
    """As it is saved to need less memory."""
    pipeline = sd3()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipeline


def drawn(pipeline, asked):
    return draw(pipeline, asked, max_sequence_length=16)  # the tokenizer's


CASES = [Case("sd3", sd3, "sd3", draw=drawn),
         Case("sd3-without-t5", sd3_without_t5, "sd3"),
         Case("sd3.5", sd35, "sd3", draw=drawn, odd=Size(64, 200))]  # larger than its table of positions, 24 patches of 8 pixels
