"""What a saved LoRA tells of itself: modelspec's fields, and of the run that made it."""

import dataclasses
import hashlib
import json

import pytest
import torch
from comfy_dancegrpo import headers
from comfy_dancegrpo.lora import files
from comfy_dancegrpo.lora.adapter import LoraSettings, LoraSnapshot
from comfy_dancegrpo.runs import notes
from comfy_dancegrpo.workflow.host import use
from loopback import Noting

LAYERS = {"flux-1-dev/lora": ("single_transformer_blocks.37.attn.to_q", 3072), "hunyuan-video/lora": ("single_transformer_blocks.39.norm.linear", 3072),
          "stable-diffusion-xl-v1-base/lora": ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", 2048), None: ("transformer_blocks.0.attn.to_q", 16)}
LAYOUTS = {"stable-diffusion-xl-v1-base/lora": "kohya", "hunyuan-video/lora": "hunyuan_video"}


def test_the_architecture_is_told_where_there_is_but_one(tmp_path):
    for architecture, (layer, width) in LAYERS.items():
        tensors = {f"{layer}.lora_A.weight": torch.ones(1, width), f"{layer}.lora_B.weight": torch.ones(8, 1)}
        snapshot = LoraSnapshot(tensors, LoraSettings(1, 1.0), "some", LAYOUTS.get(architecture, "diffusers"), 3, False, None)
        path, = files.save(snapshot, tmp_path / "tuned.safetensors")
        told = headers.metadata(path)
        assert told.get("modelspec.architecture") == architecture
        assert (told["modelspec.sai_model_spec"], told["modelspec.title"], told["modelspec.implementation"]) == ("1.0.0", "tuned", "diffusers")
        assert (told["dancegrpo.policy"], told["dancegrpo.iterations"]) == ("some", "3") and "dancegrpo.workflow" not in told


def test_a_run_tells_its_reward_settings_and_workflow(cli, prompt, saved, tiny_loop, tmp_path):
    loop_only = {node_id: node for node_id, node in prompt.items() if int(node_id) <= 11 and node["class_type"] != "PreviewImage"}
    output = tmp_path / "output"
    assert cli("run", saved(loop_only), "--output", output, *tiny_loop).status == 0
    run = output / "quickstart"
    told = headers.metadata(run / "lora" / "quickstart.safetensors")
    executed = json.loads((run / "prompt.json").read_text())
    reward, = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["rewards"]
    assert told["dancegrpo.reward"] == f"{reward} x 1"
    settings = json.loads(told["dancegrpo.settings"])
    assert settings["sample"]["steps"] == executed["5"]["inputs"]["steps"] and settings["loop"]["learning_rate"] == executed["4"]["inputs"]["learning_rate"]
    assert not {"run_name", "iterations", "policy", "prompts"} & settings["loop"].keys()
    assert told["modelspec.resolution"] == f"{executed['5']['inputs']['width']}x{executed['5']['inputs']['height']}"
    nodes = {node_id: {"class_type": node["class_type"], "inputs": node["inputs"]} for node_id, node in executed.items()}
    assert told["dancegrpo.workflow"] == hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()


def test_titles_are_no_part_of_the_workflows_hash_and_inputs_are():
    prompt = {"1": {"class_type": "A", "inputs": {"x": 1, "y": ["2", 0]}}, "2": {"class_type": "B", "inputs": {}}}
    titled = {"2": prompt["2"], "1": {**prompt["1"], "_meta": {"title": "mine"}}}
    other = {**prompt, "1": {"class_type": "A", "inputs": {"x": 2, "y": ["2", 0]}}}
    assert notes.digest(prompt) == notes.digest(titled) != notes.digest(other)


def test_the_digest_of_a_snapshot_knows_nothing_of_it(tmp_path):
    tensors = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 16), "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 1)}
    snapshot = LoraSnapshot(tensors, LoraSettings(1, 1.0), "some", "diffusers", 3, False, None)
    assert snapshot.digest() == dataclasses.replace(snapshot, folder=tmp_path).digest()


@pytest.mark.parametrize("damage", ["{", "[]", '{"1": {}}'])
def test_a_damaged_file_of_the_run_is_left_out_and_told(tmp_path, damage):
    (tmp_path / "prompt.json").write_text(damage)
    (tmp_path / "metrics.jsonl").write_text('{"rewards": {"clip_score": {"weight": 2.0}}}\n')
    with use(Noting()) as host:
        assert notes.of(tmp_path) == {"dancegrpo.reward": "clip_score x 2"}
        (tmp_path / "prompt.json").unlink()
        (tmp_path / "metrics.jsonl").write_text("{\n")
        assert notes.of(tmp_path) == {}
    assert host.said == [f"{tmp_path / name} is damaged; the LoRA's metadata goes without it" for name in ("prompt.json", "metrics.jsonl")]
