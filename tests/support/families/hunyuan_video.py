import dataclasses

import tiny
import torch
from comfy_dancegrpo.grpo.protocol import Size
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import LlamaConfig, LlamaModel

from . import PROMPTS, Case, draw_video

SPECIAL = ("<|pad|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def parts(make=tiny.seeded, **transformer):
    """Of a pipeline in HunyuanVideo's layout; `make` makes its transformer."""
    tokenizer = tiny.byte_bpe([DEFAULT_PROMPT_TEMPLATE["template"], *PROMPTS], SPECIAL)
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
              "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 32, "pooled_projection_dim": 32,
              "rope_axes_dim": (4, 6, 6), **transformer}
    vae = tiny.seeded(AutoencoderKLHunyuanVideo, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    return {"text_encoder": tiny.seeded(LlamaModel, LlamaConfig(**tiny.decoder_config(tokenizer))), "tokenizer": tokenizer,
            "text_encoder_2": tiny.clip_text(positions=77), "tokenizer_2": tiny.clip_tokenizer(),
            "transformer": make(HunyuanVideoTransformer3DModel, **config), "vae": vae,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)}


def cheaply(make, **config):
    """A module of any width, in which every weight repeats the same few random numbers, scaled as layers usually are."""
    with torch.device("meta"):
        module = make(**config)
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    few = torch.randn(4099)
    for p in module.parameters():
        flat = p.data.view(-1)
        flat.copy_(few.repeat(-(-len(flat) // len(few)))[:len(flat)]).mul_((p.shape[1] if p.ndim > 1 else 2500) ** -0.5)
    return module.eval()


# diffusers reads LoRAs of this layout at the width 3072 alone
WIDE = {"attention_head_dim": 1536, "num_refiner_layers": 0, "mlp_ratio": 0.01, "rope_axes_dim": (512, 512, 512)}


def wide(case, build):
    """The case, whose LoRA is loaded into the pipeline that `build` makes, which is of that width."""
    return dataclasses.replace(case, for_lora=dataclasses.replace(case, build=build, steps=1, prompts=case.prompts[:1]))


def hunyuan_video(make=tiny.seeded, **transformer):
    return HunyuanVideoPipeline(**parts(make, **transformer))


CASE = Case("hunyuan-video", hunyuan_video, comfyui="hunyuan_video", draw=draw_video, size=Size(32, 32, 5), odd=Size(32, 40, 5), guidance_scale=6.018)
CASES = [wide(CASE, lambda: hunyuan_video(cheaply, **WIDE))]
