"""Which family a single file is of, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import RunError

PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "transformer.", "unet.")  # before a denoiser's names, in files of whole models
HELD = {
    # component -> what is before its names in files of whole models
    "vae": ("first_stage_model.", "vae."), "audio_vae": ("audio_vae.",), "vocoder": ("vocoder.",), "connectors": ("text_embedding_projection.",),
}
TEXTS = ("cond_stage_model.", "conditioner.", "text_encoders.")  # before those of text encoders
OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.", "audio_vae.", "vocoder.",
               "model_ema.", "text_embedding_projection.")
QUANTISED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant", ".absmax", ".quant_map")  # ends of names; quantised weights come with them
# pipelines -> names of which a file has all; a name after "!" it has not. First the model's own, then diffusers'. The first row that fits counts.
_FAMILIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("StableDiffusionXLPipeline",), ("input_blocks.0.0.weight", "label_emb.0.0.weight")),
    (("StableDiffusionXLPipeline",), ("down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight")),
    (("StableDiffusionPipeline",), ("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight")),
    (("StableDiffusionPipeline",), ("down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight")),
    (("StableDiffusion3Pipeline",), ("joint_blocks.0.context_block.adaLN_modulation.1.bias",)),
    (("StableDiffusion3Pipeline",), ("pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight")),
    (("Flux2Pipeline", "Flux2KleinPipeline"), ("single_stream_modulation.lin.weight",)),
    (("Flux2Pipeline", "Flux2KleinPipeline"), ("single_stream_modulation.linear.weight",)),
    (("HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"), ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias", "!byt5_in.fc1.weight")),
    (("HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"), ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",)),
    (("FluxPipeline", "FluxKontextPipeline"), ("double_blocks.0.img_attn.norm.key_norm.scale", "vector_in.in_layer.weight",
                                               "!distilled_guidance_layer.in_proj.bias")),
    (("FluxPipeline", "FluxKontextPipeline"), ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight")),
    (("WanPipeline", "WanImageToVideoPipeline"), ("head.modulation", "!vace_blocks.0.after_proj.bias", "!motion_encoder.dec.direction.weight")),
    (("WanPipeline", "WanImageToVideoPipeline"), ("condition_embedder.time_proj.weight", "!vace_blocks.0.proj_out.bias", "!motion_encoder.conv_in.weight")),
    (("LTX2Pipeline", "LTX2ImageToVideoPipeline"), ("patchify_proj.weight", "audio_patchify_proj.weight")),
    (("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"), ("patchify_proj.weight", "scale_shift_table")),
    (("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"), ("proj_in.weight", "caption_projection.linear_1.weight", "time_embed.linear.weight")),
    (("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"), ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    (("ZImagePipeline",), ("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight")),
)


def prefix(names: Collection[str]) -> str:
    """What stands before the denoiser's names in a file: one of `PREFIXES`, or nothing."""
    return next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")


def own_name(name: str, before: str) -> str | None:
    """A tensor's name within the denoiser; None of another part's tensor."""
    if before:
        return name.removeprefix(before) if name.startswith(before) else None
    return None if name.startswith(OTHER_PARTS) else name


def holds(names: Collection[str], component: str, cls: str) -> bool:
    """Whether a file with tensors of these names, of a whole model, seems to hold a component of that class."""
    if component.startswith("text_encoder"):
        before = ("text_encoders.t5xxl.",) if cls == "T5EncoderModel" else TEXTS if cls.startswith("CLIP") else ()
    else:
        before = HELD.get(component, ())
    return any(name.startswith(before) for name in names)


def pipelines(names: Collection[str], file, input: str = "policy") -> tuple[str, ...]:
    """The diffusers pipelines that a file with tensors of these names may be of. Raises `RunError`, one line with what was seen."""
    if odd := next((name for name in names if name.endswith(QUANTISED)), None):
        raise RunError(f'input "{input}": found quantised weights in {file} ({odd}), accepted: weights in float32, bfloat16, float16 or plain float8')
    before = prefix(names)
    own = {name for name in (own_name(name, before) for name in names) if name}
    for found, marks in _FAMILIES:
        if all((mark[1:] not in own) if mark.startswith("!") else (mark in own) for mark in marks):
            return found
    seen = ", ".join(sorted(names)[:3])
    raise RunError(f'input "{input}": found {file}, of a family that is not known; seen: {len(names)} tensors, such as {seen}'
                   if names else f'input "{input}": found {file}, in which there is no tensor')
