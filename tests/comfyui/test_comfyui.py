"""The pack inside a real ComfyUI, by its HTTP API."""

import json
import re
import urllib.error
from pathlib import Path

import pytest
from safetensors.torch import load_file

from comfy_dancegrpo import nodes
from comfy_dancegrpo.runs import checkpoints

ROOT = Path(__file__).resolve().parent.parent.parent


def of(messages, kind) -> list[dict]:
    return [m["data"] for m in messages if m["type"] == kind]


def ended(messages) -> str:
    return messages[-1]["type"] if messages[-1]["type"] != "execution_error" else messages[-1]["data"]["exception_message"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def name_of(prompt) -> str:
    return prompt["4"]["inputs"]["run_name"]


def equal(ours: Path, theirs: Path) -> None:
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys() and len(first) > 0
    assert all((first[name] == second[name]).all() for name in first)


# -- loading ------------------------------------------------------------------------------------------------------------
def test_the_pack_loads_and_says_nothing(comfyui):
    ours = [line for line in comfyui.said.splitlines() if "dancegrpo" in line.lower()]
    print(*ours, sep="\n")
    assert len(ours) == 1 and re.search(r"^ +\d+\.\d seconds: .*comfy-dancegrpo$", ours[0])  # ComfyUI's own list of import times


def test_every_node_is_known(comfyui):
    info = comfyui.get("/object_info")
    assert nodes.NODE_CLASS_MAPPINGS.keys() <= info.keys()
    assert info["DanceGRPOLoopEnd"]["display_name"] == "Loop End" and info["DanceGRPOLoopEnd"]["output_node"]


def test_what_the_browser_loads(comfyui):
    base = "/extensions/comfy-dancegrpo"
    assert f"{base}/dancegrpo.js" in comfyui.get("/extensions")
    assert b"reward" in comfyui.get(f"{base}/docs/DanceGRPOScore.md")
    assert {p.stem for p in (ROOT / "workflows").glob("*.json")} == set(comfyui.get("/workflow_templates")["comfy-dancegrpo"])
    assert comfyui.get("/api/workflow_templates/comfy-dancegrpo/quickstart.jpg")[:2] == b"\xff\xd8"
    assert comfyui.get("/i18n")["zh"]["nodeDefs"]["DanceGRPOLoopEnd"]["display_name"]
    assert comfyui.get("/dancegrpo/runs")["active"] is None


# -- running ------------------------------------------------------------------------------------------------------------
def test_it_trains_what_the_headless_program_trains(comfyui, named, cli, saved, tmp_path):
    messages = comfyui.run(named)
    assert ended(messages) == "execution_success"
    assert cli("run", saved(named), "--output", tmp_path).status == 0
    file = f"lora/{name_of(named)}.safetensors"
    equal(comfyui.output / name_of(named) / file, tmp_path / name_of(named) / file)
    assert comfyui.counted()["comfy_dancegrpo.policies.load"] == 1  # though Preview Image is an output node of the loop's body
    assert f"{name_of(named)}.safetensors" in comfyui.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    for ran, other in (("prompt.json", "prompt.json"), ("workflow.json", "prompt.json")):
        seen = json.loads((comfyui.output / name_of(named) / ran).read_text())
        assert {i: n["inputs"] for i, n in seen.items()} == {i: n["inputs"] for i, n in named.items()} and "is_changed" not in str(seen)


def test_the_page_is_told_what_happens(comfyui, named):
    messages = comfyui.run(named)
    assert ended(messages) == "execution_success"
    moved = of(messages, "dancegrpo.run")
    assert [(m["iteration"], m["state"]) for m in moved] == [(0, "running"), (1, "running"), (2, "running"), (2, "finished")]
    assert all(m["run"] == name_of(named) and m["node"] == "10" and m["iterations"] == 2 and m["prompt_id"] for m in moved)
    previews = [m["output"]["images"][0]["filename"] for m in of(messages, "executed") if m["node"] == "8"]
    assert len(previews) == 2 and len(set(previews)) == 2
    executing = [m["node"] for m in of(messages, "executing")]
    inner = executing[executing.index("10.loop") + 1:]
    assert inner[:10] == ["5", "8", "6", "7", "9"] * 2
    states = [m["nodes"] for m in of(messages, "progress_state")]
    assert any(s.get("5", {}).get("state") == "running" and s["5"]["max"] > 1 for s in states)
    assert any(s.get("10.loop", {}).get("value") == 1 and s["10.loop"]["max"] == 2 for s in states)
    assert all(s.get("9", {}).get("state", "finished") == "finished" for s in states[-1:])


def test_queued_again_unchanged_it_trains_nothing_and_says_so(comfyui, named):
    assert ended(comfyui.run(named)) == "execution_success"
    loads, before = comfyui.counted(), len(rows(comfyui.output / name_of(named)))
    again = comfyui.run(named)
    assert ended(again) == "execution_success" and not of(again, "dancegrpo.run")
    assert comfyui.counted() == loads and len(rows(comfyui.output / name_of(named))) == before
    assert f"run '{name_of(named)}' in {comfyui.output / name_of(named)} is finished" in comfyui.said


def test_a_later_prompt_saves_nothing_in_the_runs_folder(comfyui, named):
    save = {"class_type": "DanceGRPOSaveVideo", "inputs": {"fps": 8.0, "filename_prefix": name_of(named)}}
    named["20"] = {**save, "inputs": {**save["inputs"], "images": ["5", 1]}}
    assert ended(comfyui.run(named)) == "execution_success"
    name, videos = name_of(named), comfyui.output / name_of(named) / "videos"
    in_the_run = sorted(p.name for p in videos.iterdir())
    assert in_the_run == [f"{name}_{n:05d}_.mp4" for n in (1, 2)]  # of its two iterations
    later = {"1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 3, "color": 0}},
             "2": {**save, "inputs": {**save["inputs"], "images": ["1", 0]}}}
    assert ended(comfyui.run(later)) == "execution_success"
    assert sorted(p.name for p in videos.iterdir()) == in_the_run and (comfyui.output / f"{name}_00001_.mp4").is_file()


def test_restart_queued_twice_trains_twice(comfyui, named):
    named["4"]["inputs"]["on_existing"] = "restart"
    for _ in range(2):
        assert [m["iteration"] for m in of(comfyui.run(named), "dancegrpo.run")] == [0, 1, 2, 2]


def test_loads_are_kept_over_two_queues_with_a_change_in_the_body(comfyui, named):
    named["15"]["inputs"]["batch_size"] = 7  # of this test alone: a reward loader that no other test has loaded
    named["6"]["inputs"]["reward"] = ["15", 0]  # the body reads the loader that Evaluate reads too
    before = comfyui.counted()
    assert ended(comfyui.run(named)) == "execution_success"
    named["9"]["inputs"]["clip_range"] = 2e-3
    assert ended(comfyui.run(named)) == "execution_success"
    after = comfyui.counted()
    assert after["comfy_dancegrpo.rewards.load"] == before["comfy_dancegrpo.rewards.load"] + 1
    assert after["comfy_dancegrpo.policies.load"] == before["comfy_dancegrpo.policies.load"]


def test_the_stop_button_keeps_what_was_trained(comfyui, named):
    named["4"]["inputs"] |= {"iterations": 1000, "checkpoint_every": 0}
    folder = comfyui.output / name_of(named)

    def stop(message):
        if message["type"] == "dancegrpo.run" and message["data"]["iteration"] == 2:
            comfyui.post("/interrupt", {})

    messages = comfyui.run(named, react=stop)
    assert ended(messages) == "execution_interrupted" and len(rows(folder)) < 1000
    done = of(messages, "dancegrpo.run")[-1]
    assert done["state"] == "stopped" and done["iteration"] == len(rows(folder)) >= 2
    assert (folder / f"lora/{folder.name}.safetensors").is_file() and json.loads((folder / "run.json").read_text())["state"] == "stopped"
    assert f"stopped after iteration {len(rows(folder))}" in comfyui.said
    named["4"]["inputs"] |= {"iterations": len(rows(folder)) + 1, "on_existing": "resume"}
    assert [m["iteration"] for m in of(comfyui.run(named), "dancegrpo.run")] == [done["iteration"], *[done["iteration"] + 1] * 2]


def test_stop_after_this_iteration_by_the_panels_button(comfyui, named):
    named["4"]["inputs"]["iterations"] = 1000

    def stop(message):
        if message["type"] == "dancegrpo.run" and message["data"]["iteration"] == 1 and message["data"]["state"] == "running":
            assert comfyui.post(f"/dancegrpo/runs/{name_of(named)}/stop", {}) == {"stopping": True}

    messages = comfyui.run(named, react=stop)
    assert ended(messages) == "execution_success"
    seen = comfyui.get(f"/dancegrpo/runs/{name_of(named)}")
    assert seen["state"] == "stopped" and seen["evaluations"]["clip_score"]["n"] == 4
    picture = seen["group"]["samples"][0]["file"]
    assert comfyui.get(f"/dancegrpo/runs/{name_of(named)}/live/{picture}")[:2] == b"\xff\xd8"


def test_two_processes_train_behind_the_page(comfyui, named):
    named["4"]["inputs"]["processes"] = 2
    messages = comfyui.run(named)
    assert ended(messages) == "execution_success"
    moved, folder = of(messages, "dancegrpo.run"), comfyui.output / name_of(named)
    assert [(m["iteration"], m["state"]) for m in moved] == [(0, "running"), (1, "running"), (2, "running"), (2, "finished")]
    assert all(m["run"] == folder.name and m["node"] == "10" and m["prompt_id"] for m in moved)
    previews = [image for m in of(messages, "executed") for image in (m["output"] or {}).get("images", ()) if image["type"] == "temp"]
    assert comfyui.get(f"/view?filename={previews[-1]['filename']}&type=temp")[:4] == b"\x89PNG"
    assert checkpoints.newest(folder / "checkpoints").processes == 2
    seen = comfyui.get(f"/dancegrpo/runs/{folder.name}")
    assert seen["state"] == "finished" and seen["evaluations"]["clip_score"]["n"] == 4
    assert any(tensor.any() for tensor in load_file(folder / f"lora/{folder.name}.safetensors").values())


# -- nodes of other packs in the body -----------------------------------------------------------------------------------
def test_other_packs_nodes_in_the_body(comfyui, named):
    named["20"] = {"class_type": "TestRedness", "inputs": {"images": ["5", 1]}}
    named["21"] = {"class_type": "TestSlowDouble", "inputs": {"x": ["20", 0]}}
    named["22"] = {"class_type": "TestSum", "inputs": {"numbers": ["21", 0], "plus": 0.5}}
    named["6"] = {"class_type": "DanceGRPOScoresFromNumbers", "inputs": {"rollout": ["5", 0], "numbers": ["22", 0], "name": "redness", "weight": 1.0}}
    before = comfyui.counted()
    messages = comfyui.run(named)
    assert ended(messages) == "execution_success"
    found = rows(comfyui.output / name_of(named))
    assert [row["rewards"].keys() for row in found] == [{"redness"}] * 2 and all(row["ratio_deviation"] == 0.0 for row in found)
    counts = {k: v - before.get(k, 0) for k, v in comfyui.counted().items() if v != before.get(k, 0)}
    assert counts == {"redness under inference mode": 2, "slow under inference mode": 12}


def test_a_node_that_evicts_all_models_changes_nothing(comfyui, named):
    assert ended(comfyui.run(named)) == "execution_success"
    name = name_of(named)
    named["4"]["inputs"]["run_name"] = f"{name}_evicted"
    named["20"] = {"class_type": "TestEvict", "inputs": {"rollout": ["5", 0]}}
    named["6"]["inputs"]["rollout"] = ["20", 0]
    before = comfyui.counted()
    assert ended(comfyui.run(named)) == "execution_success"
    counts = {k: v - before.get(k, 0) for k, v in comfyui.counted().items() if k.startswith("evicted") and v != before.get(k, 0)}
    assert counts == {"evicted the policy": 2, "evicted the reward": 2}  # in the second iteration too: each was loaded again before it computed
    equal(comfyui.output / name / f"lora/{name}.safetensors", comfyui.output / f"{name}_evicted" / f"lora/{name}_evicted.safetensors")


@pytest.mark.parametrize("tensors, device, devices", [
    ("parameters", "", ["cpu", "meta"]), ("buffers", "", ["cpu", "meta"]), ("none", "", []), ("parameters", "cpu", ["cpu", "meta"]),
    ("parameters", "meta", ["meta"]),  # its own, of which ComfyUI has nothing to give away
])
def test_a_reward_leaves_the_device_when_comfyui_makes_room(comfyui, tensors, device, devices):
    messages = comfyui.run({"1": {"class_type": "TestAway", "inputs": {"tensors": tensors, "device": device}}})
    assert ended(messages) == "execution_success"
    assert of(messages, "executed")[0]["output"] == {"devices": devices, "left": [0]}


def test_a_fault_in_the_body_is_one_line_that_names_its_node(comfyui, named):
    named["5"]["inputs"]["eta"] = 0.0
    messages = comfyui.run(named)
    assert 'node 5 "Group Sample" (DanceGRPOGroupSample): input "eta": found 0.0' in ended(messages) and messages[-1]["data"]["node_id"] == "10"
    assert comfyui.get("/dancegrpo/runs")["active"] is None


def test_a_wrong_workflow_is_refused_before_it_runs(comfyui, named):
    named["4"]["inputs"]["run_name"] = "../outside"
    with pytest.raises(urllib.error.HTTPError) as refused:
        comfyui.post("/prompt", {"prompt": named})
    said = json.loads(refused.value.read())
    assert refused.value.code == 400 and "run_name" in json.dumps(said["node_errors"]["4"])
