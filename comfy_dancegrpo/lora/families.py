"""Which family a LoRA is of, by the names and widths of its layers. Importing this imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

# before a layer's name in the files of others; after the first three it has underscores for dots
FLAT = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_MMDIT = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)"
_ENDS = r"x_embedder|context_embedder|time_text_embed\..+|norm_out\.linear|proj_out"
_STREAMS = r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02]"
_ENTRY = r"img_in|txt_in|(time_in|guidance_in|vector_in)\.(in|out)_layer|final_layer\.(linear|adaLN_modulation\.1)"


@dataclass(frozen=True, eq=False)
class Family:
    """pipelines: of diffusers, as `policies.FAMILIES` names them. architecture: as modelspec calls it. modules, native: regular expressions of the
    names of layers, in diffusers and of the model's own. read_by: what brings its own names to diffusers': a layout with `from_file`, or where
    "", diffusers' own converter, which wants them with underscores ("_") or with dots. widths: published, of the inputs of layers that tell the family
    from those of the same names. depths: published, of stacks of blocks, by what the blocks' names begin with, likewise. layout: of our files, as the
    policy has it. denoiser: the component of the pipeline that they are of.
    """

    title: str
    pipelines: tuple[str, ...]
    architecture: str
    modules: str
    native: str = ""
    read_by: str = ""
    separator: str = "."
    widths: tuple[int, ...] = ()
    depths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layout: str = "diffusers"
    denoiser: str = "transformer"

    def knows(self, module: str) -> bool:
        """Whether it is a name of diffusers' for a layer of the family."""
        return re.fullmatch(self.modules, module) is not None

    def may_be(self, modules: Collection[str]) -> bool:
        """Whether all of these are the family's, with dots or underscores."""
        patterns = [pattern.replace(r"\.", r"[._]") for pattern in (self.modules, self.native) if pattern]
        return any(all(re.fullmatch(pattern, module) for module in modules) for pattern in patterns)

    def is_published(self, modules: Collection[str]) -> bool:
        """Whether the last block of one of its stacks is among them."""
        lasts = [rf"{stack}[._]{depth - 1}[._].+" for stack, depths in self.depths.items() for depth in depths]
        return any(re.fullmatch(last, module) for last in lasts for module in modules)


_UNET = (r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv"
         r"|attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))))"
         r"|conv_in|conv_out|(time_embedding|add_embedding)\.linear_[12]")
_SGM = r"(input_blocks|output_blocks)\.\d+\.\d+(\..+)?|middle_block\.\d+\..+|time_embed\.[02]|label_emb\.0\.[02]|out\.2"
_SD = {"modules": _UNET, "native": _SGM, "separator": "_", "layout": "kohya", "denoiser": "unet"}
_HUNYUAN = (r"double_blocks\.\d+\.(img|txt)_(attn[._](qkv|proj)|mlp\.(fc[12]|[02])|mod\.lin(ear)?)"
            r"|single_blocks\.\d+\.(linear[12]|modulation\.lin(ear)?)")
_LTX2 = r"transformer_blocks\.\d+\.(((audio_)?attn[12]|audio_to_video_attn|video_to_audio_attn)\.(to_[qkv]|to_out\.0)|(audio_)?ff\.net\.(0\.proj|2))"

FAMILIES = (
    Family("Stable Diffusion 1", ("StableDiffusionPipeline",), "stable-diffusion-v1", **_SD, widths=(768,)),
    Family("Stable Diffusion 2", ("StableDiffusionPipeline",), "stable-diffusion-v2-768-v", **_SD, widths=(1024,)),
    Family("SDXL", ("StableDiffusionXLPipeline",), "stable-diffusion-xl-v1-base", **_SD, widths=(2048,)),
    Family("Stable Diffusion 3", ("StableDiffusion3Pipeline",), "stable-diffusion-3",
           rf"transformer_blocks\.\d+\.({_MMDIT}|attn2\.(to_[qkv]|to_out\.0)|{_FEED_FORWARD}|norm1(_context)?\.linear)|pos_embed\.proj|{_ENDS}",
           r"joint_blocks\.\d+\.(x_block|context_block)\.(attn2?\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)", "sd3", widths=(1536, 2432)),
    Family("FLUX.1", ("FluxPipeline", "FluxKontextPipeline"), "flux-1-dev",
           rf"transformer_blocks\.\d+\.({_MMDIT}|{_FEED_FORWARD}|norm1(_context)?\.linear)"
           rf"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)|{_ENDS}",
           rf"{_STREAMS}|mod\.lin)|single_blocks\.\d+\.(linear[12]|modulation\.lin)|{_ENTRY}", separator="_", widths=(3072,),
           depths={"(double|transformer)_blocks": (19,), "single_(transformer_)?blocks": (38,)}),
    Family("FLUX.2", ("Flux2Pipeline", "Flux2KleinPipeline"), "flux-2",
           rf"transformer_blocks\.\d+\.({_MMDIT}|ff(_context)?\.linear_(in|out))"
           r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)|(single_stream_modulation|double_stream_modulation_(img|txt))\.linear"
           r"|x_embedder|context_embedder|time_guidance_embed\..+|norm_out\.linear|proj_out",
           rf"{_STREAMS})|single_blocks\.\d+\.linear[12]|(single_stream_modulation|double_stream_modulation_(img|txt))\.lin|{_ENTRY}",
           separator="_", widths=(3072, 4096, 6144), depths={"(double|transformer)_blocks": (5, 8), "single_(transformer_)?blocks": (20, 24, 48)}),
    Family("HunyuanVideo", ("HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"), "hunyuan-video",
           rf"transformer_blocks\.\d+\.({_MMDIT}|{_FEED_FORWARD}|norm1(_context)?\.linear)"
           r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)", _HUNYUAN, "hunyuan_video", widths=(3072,),
           depths={"(double|transformer)_blocks": (20,), "single_(transformer_)?blocks": (40,)}, layout="hunyuan_video"),
    Family("Qwen-Image", ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"), "qwen-image",
           rf"transformer_blocks\.\d+\.({_MMDIT}|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
           r"|img_in|txt_in|time_text_embed\..+|norm_out\.linear|proj_out", widths=(3072,), depths={"transformer_blocks": (60,)}),
    Family("Z-Image", ("ZImagePipeline",), "z-image",
           r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
           r"|(all_x_embedder|all_final_layer|cap_embedder|t_embedder)\..+",
           r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(qkv|out)|feed_forward\.w[123]|adaLN_modulation\.0)", separator="_", widths=(3840,)),
    Family("Wan", ("WanPipeline", "WanImageToVideoPipeline"), "wan",
           r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)|ffn\.net\.(0\.proj|2))|condition_embedder\..+|proj_out",
           r"blocks\.\d+\.((self|cross)_attn\.([qkvo]|[kv]_img)|ffn\.[02])|(time|text)_embedding\.[02]|time_projection\.1|head\.head|img_emb\.proj\.[13]",
           "wan", layout="wan"),
    Family("LTX-Video", ("LTXPipeline", "LTXImageToVideoPipeline"), "ltx-video",
           r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))|proj_in|proj_out|(time_embed|caption_projection)\..+",
           widths=(2048, 4096), depths={"transformer_blocks": (28, 48)}, layout="ltx"),
    Family("LTX-2", ("LTX2Pipeline",), "ltx-2",
           rf"{_LTX2}|(audio_)?proj_(in|out)|(audio_)?(time_embed|caption_projection)\..+|av_cross_attn_\w+\..+",
           rf"{_LTX2}|(audio_)?(patchify_proj|proj_out)|(audio_)?(adaln_single|caption_projection)\..+|av_ca_\w+\..+",
           widths=(4096,), depths={"transformer_blocks": (48,)}, layout="ltx"),
)


def of_pipeline(name: str) -> Family:
    """The family of a pipeline's class. Raises `KeyError` for one that has none here."""
    found = [family for family in FAMILIES if name in family.pipelines]
    if not found:
        raise KeyError(name)
    return found[0]


def plain(module: str) -> str:
    """A layer's name without what files put before it."""
    while before := next((p for p in DOTTED if module.startswith(p)), ""):
        module = module.removeprefix(before)
    return module.removeprefix(flat(module))


def flat(module: str) -> str:
    """What stands before a name in which underscores stand for dots, or "" before one with dots."""
    return next((p for p in FLAT if module.startswith(p)), "")


def recognise(widths: Mapping[str, int]) -> list[Family]:
    """The families that a LoRA may be of, by the width of the input of each of its layers; none where it is of no known family.

    Of several with the same names those count whose published widths and depths it has, if there are any.
    """
    found = [family for family in FAMILIES if family.may_be(widths)]
    for fits in (lambda family: not set(widths.values()).isdisjoint(family.widths), lambda family: family.is_published(widths)):
        if len(found) > 1:
            found = [family for family in found if fits(family)] or found
    return found
