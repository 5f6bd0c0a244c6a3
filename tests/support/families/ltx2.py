import dataclasses

import numpy as np
import PIL.Image
import tiny
import torch
from comfy_dancegrpo.grpo.protocol import Size
from comfy_dancegrpo.policies.ltx2 import LTX2
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, FlowMatchEulerDiscreteScheduler, LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors, utils
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from . import PROMPTS, Case, draw_video, pictured

LENGTH = 32  # of prompts in tokens
# comfy.lora.model_lora_keys_unet: "diffusion_model." and the weight's own name (comfy.ldm.lightricks.av_model.LTXAVModel)
KEYS = (r"diffusion_model\.transformer_blocks\.\d+\.(audio_to_video_attn|video_to_audio_attn|(audio_)?attn[12])\.(to_[qkv]|to_out\.0)\.lora_[AB]\.weight",
        r"diffusion_model\.transformer_blocks\.\d+\.(audio_)?ff\.net\.(0\.proj|2)\.lora_[AB]\.weight")


def ltx2():
    """No width is below 32: torch's SiLU rounds the last elements of a tensor whose number is no multiple of 32 otherwise than the rest."""
    tokenizer = tiny.byte_bpe(PROMPTS, ("<pad>", "<eos>", "<bos>"), model_max_length=LENGTH)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    text = Gemma3Config(text_config={**tiny.decoder_config(tokenizer, width=16, layers=2), "query_pre_attn_scalar": 16}, vision_config=vision)
    connectors = tiny.seeded(
        LTX2TextConnectors, caption_channels=16, text_proj_in_factor=3, video_connector_num_attention_heads=2, video_connector_attention_head_dim=8,
        video_connector_num_layers=1, video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1, audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=LENGTH, rope_type="split")
    transformer = tiny.seeded(
        LTX2VideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=16, audio_cross_attention_dim=32,
        num_layers=1, caption_channels=16, rope_type="split")
    vae = tiny.seeded(
        AutoencoderKLLTX2Video, latent_channels=8, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), spatial_compression_ratio=32, temporal_compression_ratio=8)
    vae.latents_mean.normal_(std=0.1)
    vae.latents_std.uniform_(0.5, 1.5)
    audio_vae = tiny.seeded(AutoencoderKLLTX2Audio, base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8)
    vocoder = tiny.seeded(LTX2Vocoder, in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
                          resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
                                                max_image_seq_len=4096, shift_terminal=0.1)
    return LTX2Pipeline(scheduler=scheduler, vae=vae, audio_vae=audio_vae, text_encoder=tiny.seeded(Gemma3ForConditionalGeneration, text),
                        tokenizer=tokenizer, connectors=connectors, transformer=transformer, vocoder=vocoder)


def draw(pipeline, asked):
    """With the policy's guidance, from its latents of the video and of the sound."""
    policy = LTX2("ltx-2", pipeline, torch.float32)
    video, audio = policy.split(asked.latents, asked.size)
    return draw_video(pipeline, dataclasses.replace(asked, latents=video), audio_latents=audio, max_sequence_length=LENGTH, **policy.pipeline_options())


def draw_from_picture(pipeline, asked):
    """One picture a call. The pipeline puts it into no latents that it is given: it is there already, as the pipeline itself would have put it."""
    policy, size = LTX2("ltx-2", pipeline, torch.float32), asked.size
    video, audio = policy.split(asked.latents, size)
    made = []
    for i, prompt in enumerate(asked.prompts):
        pictured = policy.pipeline_for(prompt)
        seen = utils.apply_image_conditioning_crf(np.array(prompt.picture.image()), utils.resolve_default_image_crf(pipeline.text_encoder))
        pixels = pictured.video_processor.preprocess(PIL.Image.fromarray(seen), height=size.height, width=size.width)
        whole, given = pictured.prepare_latents(pixels, 1, 8, size.height, size.width, size.frames, 0.0, torch.float32)
        latents = pictured._unpack_latents(torch.where(given[..., None] > 0, whole, video[i: i + 1]), *policy._grid(size))
        vae = pictured.vae  # whose moments the pipeline takes out of latents that it is given
        one = dataclasses.replace(asked, prompts=(str(prompt),), latents=pictured._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor))
        made.append(draw_video(pictured, one, image=prompt.picture.image(), audio_latents=audio[i: i + 1], max_sequence_length=LENGTH,
                               **policy.pipeline_options()))
    return np.concatenate(made)


CASES = [Case("ltx-2", ltx2, KEYS, draw, size=Size(64, 64, 9), odd=Size(64, 48, 9), targets="attention and feed-forward"),
         Case("ltx-2-pictured", ltx2, KEYS, draw_from_picture, pictured(), Size(64, 64, 9), Size(64, 48, 9), targets="attention and feed-forward")]
