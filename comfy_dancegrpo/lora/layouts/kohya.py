"""kohya's names for the UNet of Stable Diffusion 1.x, 2.x and SDXL: `lora_unet_down_blocks_0_….lora_down.weight`.

Blocks by diffusers' names, which ComfyUI (`comfy.utils.unet_to_diffusers`) and diffusers (`_convert_unet_lora_key`) both read, for
SDXL too. No alpha key: both take one that is missing for the rank, which is full strength.
"""

from __future__ import annotations

import re

from torch import Tensor

PREFIX = "lora_unet_"
_KINDS = {"lora_A": "lora_down", "lora_B": "lora_up"}
_MODULE = re.compile(rf"(.+)\.({'|'.join(_KINDS)})\.weight")
_KEY = re.compile(rf"{PREFIX}(\w+)\.({'|'.join(_KINDS.values())})\.weight")
_WORDS = (  # that have an underscore themselves: it stays where the others become dots
    "down_blocks mid_block up_blocks transformer_blocks single_transformer_blocks time_emb_proj time_embedding add_embedding linear_1 linear_2 "
    "conv_shortcut conv_in conv_out proj_in proj_out to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out proj_mlp ff_context norm_out "
    "norm1_context linear_in linear_out to_qkv_mlp_proj x_embedder context_embedder time_text_embed time_guidance_embed timestep_embedder text_embedder "
    "guidance_embedder img_in txt_in img_mlp txt_mlp img_mod txt_mod feed_forward adaLN_modulation noise_refiner context_refiner cap_embedder t_embedder "
    "audio_attn1 audio_attn2 audio_ff audio_to_video_attn video_to_audio_attn caption_projection condition_embedder time_embedder image_embedder time_proj "
    # the models' own
    "joint_blocks context_block x_block double_blocks single_blocks img_attn_qkv img_attn_proj txt_attn_qkv txt_attn_proj "
    "self_attn cross_attn k_img v_img text_embedding time_projection img_emb")
_PART = re.compile(rf"({'|'.join(sorted(_WORDS.split(), key=len, reverse=True))}|[^_]+)(?:_|$)")


def dotted(module: str) -> str:
    """A module's name, of which kohya's has an underscore for each dot."""
    return ".".join(_PART.findall(module))


def to_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: _MODULE.fullmatch(name).groups() for name in tensors}
    return {f"{PREFIX}{module.replace('.', '_')}.{_KINDS[kind]}.weight": tensors[name] for name, (module, kind) in parts.items()}


def from_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds = {file: ours for ours, file in _KINDS.items()}
    named = {}
    for key, value in tensors.items():
        if not (match := _KEY.fullmatch(key)):
            raise KeyError(key)
        module, kind = match.groups()
        name = dotted(module)
        if name.replace(".", "_") != module or not name.startswith(("down_blocks", "mid_block", "up_blocks", "conv_", "time_embedding", "add_")):
            raise KeyError(key)  # kohya's other names for SDXL (input_blocks_…) among them
        named[f"{name}.{kinds[kind]}.weight"] = value
    return named
