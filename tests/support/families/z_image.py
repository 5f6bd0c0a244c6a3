from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

import tiny

from . import Case

# ComfyUI of November 2025 on: comfy.lora.model_lora_keys_unet gives Lumina2 (which Z-Image is there) "transformer." before the names of
# comfy.utils.z_image_to_diffusers; the context refiner has no modulation
COMFYUI = (r"transformer\.(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])"
           r"\.lora_[AB]\.weight",
           r"transformer\.(layers|noise_refiner)\.\d+\.adaLN_modulation\.0\.lora_[AB]\.weight")


def z_image():
    denoiser = tiny.seeded(ZImageTransformer2DModel, in_channels=8, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                           cap_feat_dim=32, axes_dims=[4, 6, 6], axes_lens=[128, 32, 32])
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16), vae=tiny.autoencoder(),
        text_encoder=tiny.qwen3_text(32), tokenizer=tiny.qwen_tokenizer(), transformer=denoiser)


# the second is so short that it takes one block of 32 tokens where the first takes two
PROMPTS = ("a large red circle in the center on a white background", "a small blue star")
CASES = [Case("z-image", z_image, COMFYUI, prompts=PROMPTS)]
