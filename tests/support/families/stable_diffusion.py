import tiny
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from . import Case, draw

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def by_ddim(pipeline, asked):
    """Of the first order, on the betas and timesteps of the pipeline's own; latents of a VAE are not clipped."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return draw(pipeline, asked)


def unet(**more):
    options = {"cross_attention_dim": 32, "attention_head_dim": 2, **more}
    return tiny.seeded(UNet2DConditionModel, sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                       down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options)


def vae(**more):
    return tiny.seeded(AutoencoderKL, block_out_channels=(8, 8, 8, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1, seed=2,
                       down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **more)


def sd(scheduler):
    return StableDiffusionPipeline(vae(), tiny.clip_text(), tiny.clip_tokenizer(), unet(), scheduler, None, None, requires_safety_checker=False)


def sd15():
    return sd(PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1))


def sd2():
    """Of the kind of Stable Diffusion 2.1: v prediction; from the last timestep on ("trailing"), where it is hardest to tell from epsilon."""
    return sd(DDIMScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, steps_offset=1))


def sdxl(force_zeros_for_empty_prompt: bool = True):
    network = unet(cross_attention_dim=64, use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
                   addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24)
    return StableDiffusionXLPipeline(
        vae(scaling_factor=0.13025), tiny.clip_text(), tiny.clip_text(projection=24, seed=3), tiny.clip_tokenizer(), tiny.clip_tokenizer(), network,
        EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1), force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, add_watermarker=False)


CASES = [
    Case("sd15-pndm", sd15, "sd1", draw=by_ddim, transition="ddim"),
    Case("sd2-v", sd2, "sd1", draw=by_ddim, transition="ddim", steps=4),
    Case("sdxl-euler", sdxl, "sdxl", draw=by_ddim, transition="ddim"),
]
