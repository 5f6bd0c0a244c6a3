import dataclasses

import tiny
import torch
from comfy_dancegrpo.grpo.protocol import Size
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXImageToVideoPipeline, LTXPipeline, LTXVideoTransformer3DModel

from . import Case, draw_video, draw_video_of_picture, pictured

SIZE, ODD = Size(64, 32, 9), Size(64, 48, 9)


def parts(**vae):
    blocks = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1, 1),
              "decoder_layers_per_block": (1, 1, 1, 1, 1), "latent_channels": 8, **vae}
    autoencoder = tiny.seeded(AutoencoderKLLTXVideo, **blocks)
    autoencoder.latents_mean.normal_(std=0.1)
    autoencoder.latents_std.uniform_(0.5, 1.5)
    transformer = tiny.seeded(LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
                              cross_attention_dim=32, num_layers=1, caption_channels=32)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
                                                max_image_seq_len=4096, shift_terminal=0.1)
    return {"scheduler": scheduler, "vae": autoencoder, "text_encoder": tiny.t5_encoder(), "tokenizer": tiny.t5_tokenizer(),
            "transformer": transformer}


def ltx():
    return LTXPipeline(**parts())


def ltx_i2v():
    """Its decoder is told of noise, as those since 0.9.1 are."""
    found = parts(timestep_conditioning=True)
    tiny.certain(found["vae"].encoder.conv_out.conv, 8)
    return LTXImageToVideoPipeline(**found)


def draw_from_picture(pipeline, asked):
    """The pipeline puts the picture into no latents that it is given: it is there already, as the pipeline itself would have put it."""
    size = asked.size
    pixels = torch.cat([pipeline.video_processor.preprocess(prompt.picture.image(), height=size.height, width=size.width) for prompt in asked.prompts])
    whole, given = pipeline.prepare_latents(pixels, len(pixels), 8, size.height, size.width, size.frames, torch.float32)
    return draw_video_of_picture(pipeline, dataclasses.replace(asked, latents=torch.where(given[..., None] > 0, whole, asked.latents)))


CASES = [
    Case("ltx", ltx, "ltx", draw_video, size=SIZE, odd=ODD),
    Case("ltx-i2v", ltx_i2v, "ltx", draw_from_picture, pictured(), SIZE, ODD),
]
