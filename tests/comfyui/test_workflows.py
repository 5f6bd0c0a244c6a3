"""Every bundled workflow, but those that need models of their own, inside a real ComfyUI, by its HTTP API."""

import json

import pytest

from comfy_dancegrpo.workflow.convert import to_prompt
from comfy_dancegrpo.workflow.read import read_workflow

LORA = "quickstart/lora/quickstart.safetensors"


@pytest.fixture
def queue(comfyui, made_tiny):
    """`queue(path)`: runs a workflow as a page would queue it, made short; the pictures that it saved."""

    def run(path):
        saved = read_workflow(path)
        messages = comfyui.run(made_tiny(to_prompt(saved, comfyui.get("/object_info"))), saved.data)
        assert messages[-1]["type"] == "execution_success", messages[-1]["data"]
        outputs = [m["data"]["output"] for m in messages if m["type"] == "executed" and m["data"].get("output")]
        return [image["filename"] for output in outputs for image in output.get("images", []) if image["type"] == "output"]

    return run


def test_it_runs_to_its_end(bundled_complete, quickstart, comfyui, queue):
    if not (comfyui.output / LORA).is_file():
        queue(quickstart)  # one of the others reads its LoRA
    assert LORA in comfyui.get("/object_info/DanceGRPOLoadLora")["DanceGRPOLoadLora"]["input"]["required"]["lora"][0]
    pictures = queue(bundled_complete)
    graph = json.loads(bundled_complete.read_text(encoding="utf-8"))
    savers = [node for node in graph["nodes"] if node["type"] == "SaveImage" and node["mode"] == 0]
    assert len(pictures) == len(savers) > 0
    for node in graph["nodes"]:
        if node["type"] == "DanceGRPOLoopStart":
            assert (comfyui.output / bundled_complete.stem / "lora" / f"{bundled_complete.stem}.safetensors").is_file()
