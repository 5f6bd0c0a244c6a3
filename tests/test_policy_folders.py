"""Diffusers folders that are damaged, hold code, or hold their weights in half precision alone; and a diffusers that is too old for a family."""

import json
import shutil

import diffusers
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.host import Host, use
from families.stable_diffusion import sd15
from safetensors.torch import save_file


@pytest.fixture
def folder(tmp_path):
    """A model folder in which "sd" lies whole."""
    sd15().save_pretrained(tmp_path / "diffusers" / "sd")
    with use(Host(models=tmp_path)):
        yield tmp_path / "diffusers" / "sd"


def refused(line, name="sd"):
    found = policies.problem(name)
    assert found is not None and line in found and "\n" not in found


@pytest.mark.parametrize("code", ["unet/diffusers.py", "text_encoder/transformers.py"])
def test_code_in_the_place_of_a_library_is_refused(code, folder):
    assert policies.problem("sd") is None
    (folder / code).write_text("raise SystemExit")
    refused(f"found code in {folder / code}, accepted: a diffusers folder without code of its own")


@pytest.mark.parametrize("version, enough", [("0.36.0", False), ("0.37.0.dev0", True), ("0.100.0", True), ("1.0", True)])
def test_a_diffusers_that_ignores_the_mask_is_too_old_for_qwen_image(version, enough, monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", version)
    assert policies._class("flux", "Flux").__name__ == "Flux"
    if enough:
        assert policies._class("qwen_image", "QwenImage").__name__ == "QwenImage"
    else:
        with pytest.raises(RunError, match='^input "policy": QwenImage needs a newer diffusers than 0.36.0: 0.37 or later$'):
            policies._class("qwen_image", "QwenImage")


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"_class_name": ["a"]}', "\xff", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
def test_damaged_indices(content, folder):
    """One line about the policy that they are of, and nothing about others: also where a single file looks for its pipeline among the folders."""
    bystander = folder.parent / "another"
    bystander.mkdir()
    (bystander / "model_index.json").write_text(content, encoding="latin-1")
    refused("names no pipeline class", "another")
    single = folder.parents[1] / "checkpoints" / "sd.safetensors"
    single.parent.mkdir()
    marks = ("down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight")
    save_file({name: torch.zeros(1) for name in marks}, single)
    assert policies.problem("sd") is None and policies.problem("sd.safetensors") is None
    shards = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    shards.write_text(content, encoding="latin-1")
    refused(f"{shards} is damaged; copy or download it again")
    assert {"another", "sd", "sd.safetensors"} <= set(policies.available())


@pytest.mark.parametrize("value", [["diffusers"], ["diffusers", None], ["diffusers", 3], [["a"], "b"], ["diffusers", "UNet2DConditionModel", "x"]])
def test_a_component_that_is_no_library_and_class(value, folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": value}))
    refused(f"in {folder / 'model_index.json'}")


def test_a_folder_saved_without_a_part_that_its_pipeline_needs(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None], "tokenizer": [None, None]}))
    with pytest.raises(RunError) as found:
        policies.load("sd")
    assert str(found.value) == (f'input "policy": found {folder / "model_index.json"} without text_encoder, tokenizer, '
                                "accepted: a diffusers folder with all parts of its pipeline")


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_weights_in_the_half_precision_variant_alone_are_loaded(shards, folder, tmp_path):
    """All of one component, and in one or several files; the others are there in full."""
    half = sd15().to(torch.float16)
    shutil.rmtree(folder / "unet")
    half.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size=shards)
    assert all(".fp16" in file.name for file in (folder / "unet").glob("*.safetensors"))
    assert (len(list((folder / "unet").glob("*.safetensors"))) > 1) == (shards == "20KB")
    assert policies.problem("sd") is None
    loaded = policies.load("sd")
    for name, value in half.unet.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[name], value.float())
    vae = sd15().vae.state_dict()
    assert all(torch.equal(value, vae[name]) for name, value in loaded.pipeline.vae.state_dict().items())
    max((folder / "unet").glob("*.safetensors")).unlink()
    refused("unet")
