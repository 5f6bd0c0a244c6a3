"""The layouts of files at the published sizes, which no test has the memory for: names and shapes alone, from ComfyUI's own models."""

import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

from comfy_dancegrpo.policies import recognise, single_file

# ComfyUI's models, made on the meta device; HunyuanVideo's names as they are in its files (comfy.supported_models renames them in memory)
COMFYUI = """
import json, re, sys
sys.argv[1:] = ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.ops, torch
import comfy.ldm.flux.model as flux, comfy.ldm.hunyuan_video.model as hunyuan, comfy.ldm.lightricks.model as ltx, comfy.ldm.wan.model as wan
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit, comfy.ldm.qwen_image.model as qwen
common = {"dtype": torch.bfloat16, "device": "meta", "operations": comfy.ops.disable_weight_init}
double = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
          "axes_dim": [16, 56, 56], "qkv_bias": True, "guidance_embed": True}
made = {
    "flux": flux.Flux(**common, **double, patch_size=2, theta=10000, depth=19, depth_single_blocks=38),
    "hunyuan_video": hunyuan.HunyuanVideo(**common, **double, patch_size=[1, 2, 2], theta=256, depth=20, depth_single_blocks=40, byt5=False, meanflow=False),
    "wan": wan.WanModel(**common, model_type="t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256, text_dim=4096, in_dim=16, out_dim=16),
    "ltx": ltx.LTXVModel(**common, in_channels=128, cross_attention_dim=2048, attention_head_dim=64, num_attention_heads=32, caption_channels=4096, num_layers=28),
    "qwen_image": qwen.QwenImageTransformer2DModel(**common, in_channels=64, out_channels=16, num_layers=60),
    "sd3": mmdit.MMDiT(**common, input_size=None, pos_embed_scaling_factor=None, in_channels=16, out_channels=16, pos_embed_max_size=192, depth=24,
                       patch_size=2, adm_in_channels=2048, num_patches=192 * 192,
                       context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}}),
}
def in_the_file(name):
    for pattern, new in [(r"(img|txt)_attn[.](qkv|proj)", r"\\1_attn_\\2"), (r"(img|txt)_attn[.]norm[.]query_norm[.]scale", r"\\1_attn_q_norm.weight"),
                         (r"(img|txt)_attn[.]norm[.]key_norm[.]scale", r"\\1_attn_k_norm.weight"), (r"mlp[.]0[.]", "mlp.fc1."), (r"mlp[.]2[.]", "mlp.fc2."),
                         (r"_mod[.]lin[.]", "_mod.linear."), (r"modulation[.]lin[.]", "modulation.linear."), (r"[.]norm[.]query_norm[.]scale", ".q_norm.weight"),
                         (r"[.]norm[.]key_norm[.]scale", ".k_norm.weight"), (r"(time_in|guidance_in|t_embedder)[.]in_layer", r"\\1.mlp.0"),
                         (r"(time_in|guidance_in|t_embedder)[.]out_layer", r"\\1.mlp.2"), (r"c_embedder[.]in_layer", "c_embedder.linear_1"),
                         (r"c_embedder[.]out_layer", "c_embedder.linear_2"), (r"self_attn[.](qkv|proj)", r"self_attn_\\1")]:
        name = re.sub(pattern, new, name)
    return name
found = {family: {name: list(value.shape) for name, value in model.state_dict().items()} for family, model in made.items()}
found["hunyuan_video"] = {in_the_file(name): shape for name, shape in found["hunyuan_video"].items()}
print(json.dumps(found))
"""
# what stands before the names in a file, the pipeline, its denoiser, and what its published configuration has beside the class's defaults
FAMILIES = {
    "flux": ("", "FluxPipeline", diffusers.FluxTransformer2DModel, {"guidance_embeds": True}),
    "hunyuan_video": ("model.model.", "HunyuanVideoPipeline", diffusers.HunyuanVideoTransformer3DModel, {}),
    "wan": ("", "WanPipeline", diffusers.WanTransformer3DModel, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "ltx": ("model.diffusion_model.", "LTXPipeline", diffusers.LTXVideoTransformer3DModel, {}),
    "qwen_image": ("model.diffusion_model.", "QwenImagePipeline", diffusers.QwenImageTransformer2DModel, {}),
    "sd3": ("model.diffusion_model.", "StableDiffusion3Pipeline", diffusers.SD3Transformer2DModel,
            {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192, "sample_size": 128}),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("set COMFYUI_PATH to ComfyUI's folder to compare with its own models")
    path = os.pathsep.join(filter(None, [os.environ["COMFYUI_PATH"], os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", COMFYUI], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path_factory.mktemp("here"),
                          capture_output=True, text=True, timeout=300)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"ComfyUI's requirements are not all installed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_published_size_finds_its_place(layouts, family, tmp_path):
    before, pipeline, cls, config = FAMILIES[family]
    names = {before + name: torch.empty(shape, device="meta") for name, shape in layouts[family].items()}
    assert recognise.pipelines(names, "file")[0] == pipeline and recognise.prefix(names) == before
    with init_empty_weights():
        cls.from_config(config).save_config(tmp_path)
    own = single_file._denoiser_tensors(names, before)
    assert len(own) == len(names)
    assert sum(value.numel() for value in single_file._convert(cls, tmp_path, own).values()) == sum(value.numel() for value in names.values())
    with pytest.raises(single_file.DoesNotFit):
        single_file._convert(cls, tmp_path, dict(list(own.items())[1:]))
