"""Weights of diffusers' models in the names of the models' own files, as ComfyUI's users have them. Each is written from the models' sources,
and the other way round than diffusers' converters go."""

from __future__ import annotations

import re

import torch


def renamed(tensors, pairs, before="") -> dict:
    found = {}
    for name, value in tensors.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        found[before + name] = value.contiguous().clone()
    return found


def wan(tensors) -> dict:
    return renamed(tensors, [
        (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"), (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"), (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"), (r"^scale_shift_table", "head.modulation"), (r"^proj_out", "head.head"),
        (r"scale_shift_table", "modulation"), (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."), (r"\.to_out\.0", ".o"),
        (r"\.to_([qkv])\.", r".\1."), (r"ffn\.net\.0\.proj", "ffn.0"), (r"ffn\.net\.2", "ffn.2"), (r"\.norm2\.", ".norm_.") , (r"\.norm3\.", ".norm2."),
        (r"\.norm_\.", ".norm3."),
    ])


def ltx(tensors) -> dict:
    return renamed(tensors, [(r"^proj_in", "patchify_proj"), (r"^time_embed\.", "adaln_single."), (r"norm_q", "q_norm"), (r"norm_k", "k_norm")],
                   "model.diffusion_model.")


def ltx2(pipeline) -> dict:
    """A whole checkpoint: all but the text encoder."""
    transformer = renamed(pipeline.transformer.state_dict(), [
        (r"^(audio_)?proj_in\.", r"\1patchify_proj."), (r"^(audio_)?time_embed\.", r"\1adaln_single."),
        (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
        (r"^av_cross_attn_(?:video|audio)_(a2v|v2a)_gate\.", r"av_ca_\1_gate_adaln_single."),
        (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"), (r"\.norm_([qk])\.", r".\1_norm.")],
        "model.diffusion_model.")
    connectors = renamed(pipeline.connectors.state_dict(), [
        (r"^text_proj_in\.", "text_embedding_projection.aggregate_embed."), (r"^(video|audio)_connector\.", r"model.diffusion_model.\1_embeddings_connector."),
        (r"\.transformer_blocks\.", ".transformer_1d_blocks."), (r"\.norm_([qk])\.", r".\1_norm.")])
    statistics = [(r"^latents_mean$", "per_channel_statistics.mean-of-means"), (r"^latents_std$", "per_channel_statistics.std-of-means")]
    vae = renamed(pipeline.vae.state_dict(), [
        *((rf"^encoder\.down_blocks\.{i}\.{part}", f"encoder.down_blocks:{2 * i + more}.{new}") for i in range(4)
          for part, more, new in (("resnets", 0, "resnets"), (r"downsamplers\.0\.", 1, ""))),
        *((rf"^decoder\.up_blocks\.{i}\.{part}", f"decoder.up_blocks:{2 * i + more}.{new}") for i in range(3)
          for part, more, new in (("resnets", 2, "resnets"), (r"upsamplers\.0\.", 1, ""))),
        (r"_blocks:", "_blocks."), (r"^encoder\.mid_block", "encoder.down_blocks.8"), (r"^decoder\.mid_block", "decoder.up_blocks.0"),
        ("resnets", "res_blocks"), *statistics], "vae.")
    vocoder = renamed(pipeline.vocoder.state_dict(), [
        (r"^upsamplers\.", "ups."), (r"^resnets\.", "resblocks."), (r"^conv_in\.", "conv_pre."), (r"^conv_out\.", "conv_post.")], "vocoder.")
    return transformer | connectors | vae | renamed(pipeline.audio_vae.state_dict(), statistics, "audio_vae.") | vocoder


def z_image(tensors) -> dict:
    fused = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(.+)\.to_q\.weight", name):
            fused[f"{match[1]}.qkv.weight"] = torch.cat([tensors[f"{match[1]}.to_{part}.weight"] for part in "qkv"])
        elif not re.search(r"\.to_[kv]\.weight", name):
            fused[name] = value
    return renamed(fused, [(r"^all_final_layer\.2-1", "final_layer"), (r"^all_x_embedder\.2-1", "x_embedder"), (r"attention\.to_out\.0", "attention.out"),
                           (r"attention\.norm_([qk])", r"attention.\1_norm")])


def qwen_image(tensors) -> dict:
    return renamed(tensors, [], "model.diffusion_model.")


# -- Stable Diffusion 1.x: a whole checkpoint of CompVis' names ---------------------------------------------------------------
_RESNET = [(r"\.norm1\.", ".in_layers.0."), (r"\.conv1\.", ".in_layers.2."), (r"\.time_emb_proj\.", ".emb_layers.1."), (r"\.norm2\.", ".out_layers.0."),
           (r"\.conv2\.", ".out_layers.3."), (r"\.conv_shortcut\.", ".skip_connection.")]


def _unet(tensors, layers: int) -> dict:
    attentive = {int(match[1]) for name in tensors if (match := re.match(r"up_blocks\.(\d+)\.attentions", name))}

    def place(name: str) -> str:
        side, block, kind, number, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()
        block, number = int(block), int(number)
        if side == "down":
            at = 1 + block * (layers + 1)
            return {"resnets": f"input_blocks.{at + number}.0.", "attentions": f"input_blocks.{at + number}.1.",
                    "downsamplers": f"input_blocks.{at + layers}.0."}[kind] + (rest.replace("conv.", "op.") if kind == "downsamplers" else rest)
        at = block * (layers + 1)
        return {"resnets": f"output_blocks.{at + number}.0.", "attentions": f"output_blocks.{at + number}.1.",
                "upsamplers": f"output_blocks.{at + layers}.{2 if block in attentive else 1}."}[kind] + rest

    found = {}
    for name, value in tensors.items():
        resnet = "resnets" in name
        if name.startswith(("down_blocks", "up_blocks")):
            name = place(name)
        for pattern, new in [(r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.attentions\.0", "middle_block.1"),
                             (r"^mid_block\.resnets\.1", "middle_block.2"), (r"^time_embedding\.linear_1", "time_embed.0"),
                             (r"^time_embedding\.linear_2", "time_embed.2"), (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"),
                             (r"^conv_out", "out.2"), *(_RESNET if resnet else [])]:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


def vae(tensors) -> dict:
    """Of CompVis' autoencoder, as in the files of ComfyUI's VAE folder."""
    blocks = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    found = {}
    for name, value in tensors.items():
        if "mid_block.attentions" in name and name.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]
        name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}", name)
        for pattern, new in [(r"^encoder\.down_blocks", "encoder.down"), (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
                             (r"\.resnets\.", ".block."), (r"\.downsamplers\.0\.", ".downsample."), (r"\.upsamplers\.0\.", ".upsample."),
                             (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"), (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
                             (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"), (r"conv_norm_out", "norm_out"),
                             (r"conv_shortcut", "nin_shortcut")]:
            name = re.sub(pattern, new, name)
        found[name] = value.contiguous().clone()
    return found


def stable_diffusion(pipeline) -> dict:
    """UNet, VAE and CLIP in one file."""
    texts = {name.removeprefix("text_model."): value for name, value in pipeline.text_encoder.state_dict().items()}
    return {**renamed(_unet(pipeline.unet.state_dict(), pipeline.unet.config.layers_per_block), [], "model.diffusion_model."),
            **renamed(vae(pipeline.vae.state_dict()), [], "first_stage_model."),
            **renamed(texts, [], "cond_stage_model.transformer.text_model.")}
