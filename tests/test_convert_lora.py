"""`dancegrpo convert-lora`: a LoRA in other names, and what it cannot know is asked for in one line."""

import json

import pytest
import torch
from comfy_dancegrpo import headers, policies
from comfy_dancegrpo.lora import convert, families, foreign
from record_comfyui_keys import RECORD, pattern
from safetensors.torch import load_file, save_file

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))


def pair(name, width, height, down="lora_A", up="lora_B", alpha=None, rank=2, dtype=torch.float32):
    found = {f"{name}.{down}.weight": torch.randn(rank, width).to(dtype), f"{name}.{up}.weight": torch.randn(height, rank).to(dtype)}
    return found | ({f"{name}.alpha": torch.tensor(alpha)} if alpha else {})


FLUX = pair("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072, "lora_down", "lora_up", 1.0) | pair("lora_unet_single_blocks_37_linear2", 15360, 3072, "lora_down", "lora_up")
SDXL = pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, 640, "lora_down", "lora_up", 1.0)
WAN = pair("transformer.blocks.0.attn1.to_q", 1536, 1536)
HUNYUAN = pair("transformer.single_transformer_blocks.39.attn.to_q", 3072, 3072)
EXPERTS = {**WAN, **pair("transformer_2.blocks.0.attn1.to_q", 1536, 1536)}
NATIVE = pair("diffusion_model.double_blocks.18.img_attn.qkv", 3072, 9216) | pair("diffusion_model.double_blocks.18.img_mod.lin", 3072, 18432)
QWEN = pair("lora_unet_transformer_blocks_0_img_mlp_net_0_proj", 3072, 12288, "lora_down", "lora_up", 2.0)


@pytest.fixture
def file(tmp_path):
    def made(tensors, notes=None):
        save_file(tensors, tmp_path / "in.safetensors", metadata=notes)
        return tmp_path / "in.safetensors"

    return made


@pytest.mark.parametrize(("tensors", "names", "layers"), [
    (FLUX, "ours", {"transformer.transformer_blocks.0.attn.to_out.0", "transformer.single_transformer_blocks.37.proj_out"}),
    (SDXL, "ours", {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"}),
    (SDXL, "diffusers", {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"}),
    (SDXL, "kohya", {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"}),
    (WAN, "ours", {"diffusion_model.blocks.0.self_attn.q"}), (WAN, "diffusers", {"transformer.blocks.0.attn1.to_q"}),
    (WAN, "kohya", {"lora_unet_blocks_0_self_attn_q"}),
    (QWEN, "ours", {"transformer.transformer_blocks.0.img_mlp.net.0.proj"}), (QWEN, "kohya", {"lora_unet_transformer_blocks_0_img_mlp_net_0_proj"}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_the_names_asked_for(cli, file, tmp_path, tensors, names, layers):
    out = tmp_path / "out.safetensors"
    done = cli("convert-lora", file(tensors, {"ss_tag": "kept", "sshs_model_hash": "stale"}), out, "--names", names)
    assert done.status == 0 and done.out == [str(out)], done.err
    found, told = load_file(out), headers.metadata(out)
    bases = {key.removesuffix(".alpha").rsplit(".lora_", 1)[0] for key in found}
    assert bases == layers and ("modelspec.architecture" in told, told["ss_tag"], "sshs_model_hash" in told) == (True, "kept", False)
    family = {"flux-1-dev/lora": "flux", "stable-diffusion-xl-v1-base/lora": "sdxl", "wan/lora": "wan", "qwen-image/lora": "qwen_image"}[told["modelspec.architecture"]]
    if names != "diffusers":
        assert [key for key in found if pattern(key) not in RECORDED[family]["keys"]] == []
    assert any(key.endswith(".alpha") for key in found) == (names == "kohya")
    before, after = (effects(foreign.parse(content, {}).layers) for content in (tensors, found))
    assert len(before) == len(after) and all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(before, after))


def effects(layers):
    """What each layer does to an input, in one order whatever the names."""
    return sorted((b @ (a @ torch.linspace(-1, 1, a.shape[1])) for a, b in layers.values()), key=lambda value: value.sum().item())


def test_back_and_forth_it_is_the_same(file, tmp_path):
    for tensors in (SDXL, WAN, QWEN):
        kept = convert.read(file(tensors))
        for names in convert.NAMES:
            path, = convert.write(kept, tmp_path / f"{names}.safetensors", names)
            again = convert.read(path)
            assert again.layers.keys() == kept.layers.keys() and all(torch.equal(value, kept.layers[name]) for name, value in again.layers.items())
            path.unlink()


def test_parts_of_a_fused_layer_are_written_each_with_its_a(file, tmp_path):
    found = load_file(convert.write(convert.read(file(NATIVE)), tmp_path / "out.safetensors", "ours")[0])
    b = torch.cat([found[f"transformer.transformer_blocks.18.attn.{part}.lora_B.weight"] for part in ("to_q", "to_k", "to_v")])
    assert torch.equal(b, NATIVE["diffusion_model.double_blocks.18.img_attn.qkv.lora_B.weight"])
    assert torch.equal(found["transformer.transformer_blocks.18.attn.to_k.lora_A.weight"], NATIVE["diffusion_model.double_blocks.18.img_attn.qkv.lora_A.weight"])


def test_half_precision_stays(file, tmp_path):
    path, = convert.write(convert.read(file(pair("diffusion_model.blocks.0.self_attn.q", 64, 64, dtype=torch.bfloat16))), tmp_path / "out.safetensors", "ours")
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}


def test_two_experts_are_two_files(cli, file, tmp_path):
    done = cli("convert-lora", file(EXPERTS), tmp_path / "out.safetensors")
    assert done.out == [str(tmp_path / f"out_{expert}_noise.safetensors") for expert in ("high", "low")]
    assert all("diffusion_model.blocks.0.self_attn.q.lora_A.weight" in load_file(path) for path in done.out)


def test_of_two_experts_both_or_none_are_written(cli, file, tmp_path):
    second = tmp_path / "out_low_noise.safetensors"
    second.write_bytes(b"mine")
    done = cli("convert-lora", file(EXPERTS), tmp_path / "out.safetensors")
    assert done.status == 3 and f"found {second}, which is there already" in done.verdict[0]
    assert sorted(path.name for path in tmp_path.glob("out*")) == [second.name] and second.read_bytes() == b"mine"


def test_what_is_missing_of_a_fused_layer_is_asked_of_the_base_model(cli, file, tmp_path, monkeypatch):
    out, path = tmp_path / "out.safetensors", file(HUNYUAN)
    done = cli("convert-lora", path, out)
    assert done.status == 3 and "its shape is the base model's; name that with --policy" in done.verdict[0] and not out.exists()
    config = {"num_layers": 1, "num_single_layers": 40, "num_refiner_layers": 1}
    folder = tmp_path / "models" / "diffusers" / "hunyuan"  # without its weights, which nobody asks for
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "HunyuanVideoTransformer3DModel", **config}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline", "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"]}))
    done = cli("convert-lora", path, out, "--policy", "hunyuan", "--models", tmp_path / "models")
    assert done.status == 0, done.err
    found = load_file(out)
    fused = found["transformer.single_blocks.39.linear1.lora_B.weight"] @ found["transformer.single_blocks.39.linear1.lora_A.weight"]
    assert fused.shape == (21504, 3072) and not fused[3072:].any()
    own = [HUNYUAN[f"transformer.single_transformer_blocks.39.attn.to_q.lora_{side}.weight"] for side in "BA"]
    assert torch.allclose(fused[:3072], own[0] @ own[1], atol=1e-4)


def test_without_out_it_says_what_it_is(cli, file):
    done = cli("convert-lora", file(FLUX))
    assert done.status == 0 and done.out[0].endswith("in.safetensors: FLUX.1, 2 layers, rank 2")


UNSURE = pair("diffusion_model.double_blocks.0.img_attn.qkv", 64, 192) | pair("diffusion_model.single_blocks.0.linear2", 320, 64)
TWO = pair("transformer.transformer_blocks.0.attn.to_q", 3072, 3072) | pair("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072)


@pytest.mark.parametrize(("tensors", "words", "status", "line"), [
    (FLUX, ("--names", "nobodys"), 2, "--names: found 'nobodys', accepted: ours, diffusers, kohya"),
    (FLUX, ("--names", "kohya"), 3, "kohya's names are not written for FLUX.1, accepted: Stable Diffusion 1, "),
    (UNSURE, (), 3, "may be of FLUX.1 or FLUX.2 or HunyuanVideo; say of which base model with --policy"), (TWO, (), 3, "may be of FLUX.1 or HunyuanVideo; say of which"),
    (pair("some.thing", 4, 4), (), 3, "is of a family that is not known (its layers: some.thing)"),
    (WAN, ("--policy", "embedded"), 3, "is one of Wan (transformer.blocks.0.attn1.to_q), accepted: one of FLUX.1"),
    (FLUX, ("--policy", "nowhere"), 3, """input "policy": found 'nowhere'"""), (TWO, ("--policy", "embedded"), 3, "is [3072, 3072] in the one and ["),
])
def test_what_it_cannot_do_is_one_line(cli, file, tmp_path, tensors, words, status, line):
    done = cli("convert-lora", file(tensors), tmp_path / "out.safetensors", *words)
    assert (done.status, len(done.verdict)) == (status, 1) and line in done.verdict[0], done.err
    assert not (tmp_path / "out.safetensors").exists()


def test_no_file_is_overwritten_and_out_is_named_as_one(cli, file, tmp_path):
    path = file(FLUX)
    before = path.read_bytes()
    done = cli("convert-lora", path, path)
    assert "which is there already" in done.verdict[0] and path.read_bytes() == before
    assert cli("convert-lora", path, tmp_path / "out.bin").verdict == [f"OUT: found {tmp_path / 'out.bin'}, accepted: a .safetensors file"]


def test_every_family_is_here_with_its_policys_layout():
    for pipeline, (module, name) in policies.FAMILIES.items():
        assert families.of_pipeline(pipeline).layout == policies._class(module, name).lora_layout
