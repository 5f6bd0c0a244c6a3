"""Records which keys of a LoRA the ComfyUI in COMFYUI_PATH knows, for each family that it has: `python tests/support/record_comfyui_keys.py` writes
tests/data/comfyui_lora_keys.json. Families that this ComfyUI is too old for keep what was recorded before.

By its own `comfy.lora.model_lora_keys_unet` on its own model classes, at published widths without weights (on the meta device).
Of a family: `keys`, what stands before `.lora_A.weight` and its like, N for each block's number; `layers`, diffusers' layers in the model's own, where ComfyUI
has such a table: its name, and of a layer that holds several which part of the rows it is, of how many.
"""

import importlib
import json
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

RECORD = Path(__file__).resolve().parent.parent / "data" / "comfyui_lora_keys.json"
_UNET = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4, "model_channels": 320,
         "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
         "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "use_linear_in_transformer": False}
_FLUX = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
         "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}
# by family: its class in comfy.supported_models, and the model's configuration
FAMILIES = {
    "sd1": ("SD15", _UNET),
    "sdxl": ("SDXL", {**_UNET, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
                            "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048,
                            "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816}),
    "sd3": ("SD3", {"input_size": None, "pos_embed_scaling_factor": None, "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 192,
                          "depth": 24, "patch_size": 2, "adm_in_channels": 2048, "num_patches": 192 * 192, "qk_norm": "rms", "x_block_self_attn_layers": [0],
                          "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}}}),
    "flux": ("Flux", _FLUX),
    "flux2": ("Flux2", {"in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 15360, "hidden_size": 6144, "mlp_ratio": 3.0,
                              "num_heads": 48, "depth": 8, "depth_single_blocks": 48, "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1,
                              "qkv_bias": False, "guidance_embed": True, "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
                              "txt_ids_dims": [3], "image_model": "flux2"}),
    "hunyuan_video": ("HunyuanVideo", {**_FLUX, "patch_size": [1, 2, 2], "theta": 256, "depth": 20, "depth_single_blocks": 40, "byt5": False,
                                             "meanflow": False}),
    "qwen_image": ("QwenImage", {"in_channels": 64, "out_channels": 16, "num_layers": 60}),
    "z_image": ("ZImage", {"patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30, "qk_norm": True, "n_heads": 30,
                                 "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8 / 3,
                                 "z_image_modulation": True, "time_scale": 1000.0, "image_model": "lumina2"}),
    "wan": ("WAN21_I2V", {"model_type": "i2v", "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "freq_dim": 256, "text_dim": 4096,
                                "in_dim": 36, "out_dim": 16}),
    "ltx": ("LTXV", {"in_channels": 128, "cross_attention_dim": 2048, "attention_head_dim": 64, "num_attention_heads": 32, "caption_channels": 4096,
                           "num_layers": 28}),
    "ltx2": ("LTXAV", {"in_channels": 128, "cross_attention_dim": 4096, "attention_head_dim": 128, "num_attention_heads": 32,
                             "caption_channels": 3840, "num_layers": 48, "image_model": "ltxav"}),
}
kept = []  # what torch forgets with its last reference
_NUMBER = re.compile(r"((?:blocks|layers|refiner|attentions|resnets|samplers)[._])\d+")  # of a block in its stack
_SIDE = re.compile(r"[.](lora_A|lora_B|lora_down|lora_up)[.]weight|[.]alpha")


def pattern(key: str) -> str:
    """A key of a LoRA file as the record has it: without its matrix, N for the number of each block."""
    return _NUMBER.sub(r"\1N", _SIDE.sub("", key))


def model_of(name: str, config: dict):
    """A model of ComfyUI's without weights; None where this ComfyUI has none of that name."""
    import comfy.supported_models
    import torch

    kind = getattr(comfy.supported_models, name, None)
    if kind is None:
        return None
    made = kind({**config, "dtype": torch.float16})
    return made.get_model({}, device=torch.device("meta"))


def keys_of(model) -> dict[str, object]:
    """What a LoRA may change by ComfyUI's own table: key -> the weight's name, or that and (dimension, first row, rows)."""
    import comfy.lora

    weights = {name for name, p in model.named_parameters() if p.ndim > 1}
    known = comfy.lora.model_lora_keys_unet(model, {})
    return {key: to for key, to in known.items() if (to if isinstance(to, str) else to[0]) in weights}


def record_of(model) -> dict:
    known, rows = keys_of(model), {name: len(p) for name, p in model.named_parameters() if p.ndim > 1}
    by_diffusers = ("unet.", "transformer.")
    layers = {}
    for key, to in known.items():
        if not key.startswith(by_diffusers):
            continue
        name, part = (to, None) if isinstance(to, str) else (to[0], to[1] if len(to) > 1 else None)
        own = name.removeprefix("diffusion_model.").removesuffix(".weight")
        ours = key.partition(".")[2]
        if key.startswith("unet."):
            ours = re.sub(r"(attn[12][.]to_out)$", r"\1.0", ours.replace(".processor.to_", ".to_"))
        if own != ours:
            layers[ours] = [own, *((str(Fraction(part[1], rows[name])), str(Fraction(part[2], rows[name]))) if part else ())]
    return {"keys": sorted({pattern(key) for key in known}), "layers": _shortened(layers)}


def _shortened(layers: dict) -> dict:
    """One entry for all the blocks of a stack, and of a UNet, whose blocks are counted otherwise, one for what its blocks have in common."""
    found = {}
    for ours, (own, *part) in layers.items():
        if match := re.fullmatch(r"((?:down_blocks|up_blocks)[.]\d+[.]attentions[.]\d+|mid_block[.]attentions[.]0)(.*)", ours):
            ours, own = match[1], own.removesuffix(match[2])
        elif not re.match(r"down_blocks|mid_block|up_blocks|conv_in", ours):
            ours, own = pattern(ours), pattern(own)
        found[ours] = [own, *part]
    return found


def record() -> dict:
    """Of every family that this ComfyUI has."""
    found = {}
    for family, (name, config) in FAMILIES.items():
        if (model := model_of(name, config)) is not None:
            found[family] = record_of(model)
    return found


def start() -> str:
    """Makes ComfyUI's modules importable, and returns its version."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "comfyui"))
    from start import complete_torchvision

    kept.append(complete_torchvision())
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    return importlib.import_module("comfyui_version").__version__


if __name__ == "__main__":
    version = start()
    found = {family: {"comfyui": version, **told} for family, told in record().items()}
    if "--print" in sys.orig_argv:
        print(json.dumps(found))
    else:
        before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
        lines = (f"{json.dumps(family)}: {json.dumps(told, sort_keys=True)}" for family, told in sorted((before | found).items()))
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"recorded {', '.join(found)}; not in ComfyUI {version}: {', '.join(FAMILIES.keys() - found.keys()) or 'none'}")
