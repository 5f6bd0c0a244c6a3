"""The names of HunyuanVideo's own layers: what is trained goes into a file and comes back, and means the same there."""

import pytest
import torch
from comfy_dancegrpo.lora.layouts import layout

WIDTH, MLP, RANK = 6, 10, 2
DOUBLE = {"attn.to_q": WIDTH, "attn.to_k": WIDTH, "attn.to_v": WIDTH, "attn.to_out.0": WIDTH, "ff.net.0.proj": MLP, "norm1_context.linear": 6 * WIDTH}
SINGLE = {"attn.to_q": WIDTH, "attn.to_k": WIDTH, "attn.to_v": WIDTH, "proj_mlp": MLP}


@pytest.fixture
def trained():
    torch.manual_seed(0)
    modules = {f"transformer_blocks.0.{name}": out for name, out in DOUBLE.items()}
    modules |= {f"single_transformer_blocks.11.{name}": out for name, out in SINGLE.items()}
    return {f"{name}.lora_{side}.weight": torch.randn(shape) for name, out in modules.items() for side, shape in (("A", (RANK, WIDTH)), ("B", (out, RANK)))}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_there_and_back(trained):
    names = layout("hunyuan_video")
    content = names.to_file(trained)
    assert {key.removesuffix(".lora_A.weight") for key in content if ".lora_A." in key} == {
        "transformer.double_blocks.0." + name for name in ("img_attn_qkv", "img_attn_proj", "img_mlp.fc1", "txt_mod.linear")
    } | {"transformer.single_blocks.11.linear1"}
    assert equal(names.from_file(content), trained)


def test_a_fused_layer_is_its_parts_one_below_the_other(trained):
    content = layout("hunyuan_video").to_file(trained)
    fused = content["transformer.single_blocks.11.linear1.lora_B.weight"] @ content["transformer.single_blocks.11.linear1.lora_A.weight"]
    parts = [trained[f"single_transformer_blocks.11.{name}.lora_B.weight"] @ trained[f"single_transformer_blocks.11.{name}.lora_A.weight"] for name in SINGLE]
    torch.testing.assert_close(fused, torch.cat(parts))


def test_a_file_of_others_whose_parts_share_one_a():
    names = layout("hunyuan_video")
    a, b = torch.randn(RANK, WIDTH), torch.randn(3 * WIDTH, RANK)
    found = names.from_file({"diffusion_model.double_blocks.3.txt_attn_qkv.lora_A.weight": a, "diffusion_model.double_blocks.3.txt_attn_qkv.lora_B.weight": b})
    assert torch.equal(torch.cat([found[f"transformer_blocks.3.attn.{name}.lora_B.weight"] for name in ("add_q_proj", "add_k_proj", "add_v_proj")]), b)
    assert all(torch.equal(value, a) for key, value in found.items() if ".lora_A." in key) and len(found) == 6


@pytest.mark.parametrize("key", ["transformer.double_blocks.0.img_attn.lora_A.weight", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
                                 "transformer.single_blocks.0.linear1.alpha"])
def test_a_key_that_is_none_of_the_layouts(key):
    with pytest.raises(KeyError, match=key):
        layout("hunyuan_video").from_file({key: torch.zeros(1)})


def test_part_of_a_fused_layer_is_no_file(trained):
    del trained["single_transformer_blocks.11.attn.to_k.lora_A.weight"]
    with pytest.raises(KeyError, match="attn.to_k"):
        layout("hunyuan_video").to_file(trained)
