"""Runs of the quickstart with the embedded policy, made tiny: what they write, and that equal runs are equal bit for bit."""

import json
import math
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comfy_dancegrpo import nodes
from comfy_dancegrpo.runs import pictures

KEYS = ("iteration", "reward_mean", "reward_std", "group_std", "ratio_deviation", "clip_fraction", "approx_kl", "grad_norm", "loss",
        "learning_rate", "flat_groups", "denoiser_calls", "seconds")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def trained(folder):
    """The saved LoRA, and each iteration's metrics without the time that it took."""
    clock = ("seconds", "time")
    return load_file(folder / "lora" / f"{folder.name}.safetensors"), [{k: v for k, v in r.items() if k not in clock} for r in rows(folder)]


def assert_equal(run, other):
    (a, metrics_a), (b, metrics_b) = run, other
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    assert metrics_a == metrics_b


@pytest.fixture(scope="module")
def first(cli, quickstart, tiny, tmp_path_factory):
    """The output folder of a run of two iterations, and how the program ended; tests that run there again take a copy."""
    output = tmp_path_factory.mktemp("first")
    done = cli("run", quickstart, "--output", output, *tiny)
    assert done.status == 0, done.err
    return output / "quickstart", done


@pytest.fixture
def again(first, tmp_path):
    """A copy of the first run's folder, under its name."""
    return shutil.copytree(first[0], tmp_path / "output" / "quickstart")


# -- what a run writes --------------------------------------------------------------------------------------------------
def test_files(first, quickstart):
    folder, done = first
    assert (folder / "workflow.json").read_bytes() == quickstart.read_bytes()
    prompt = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    assert prompt["4"]["inputs"]["iterations"] == 2 and prompt["5"]["inputs"]["group_size"] == 3
    assert {p.name for p in folder.iterdir()} == {"workflow.json", "prompt.json", "run.json", "metrics.jsonl", "summary.json", "images",
                                                  "checkpoints", "lora", "live", "environment.json", "pictures", "report.html"}
    images = ["before_after_00001_.png", "preview_8.png", "reward_curve_00001_.png"]
    assert sorted(p.name for p in (folder / "images").iterdir()) == images
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["0000002.safetensors"]
    assert [p.name for p in (folder / "lora").iterdir()] == ["quickstart.safetensors"]
    assert set(done.out) == {str(folder), *(str(folder / "images" / name) for name in images if "preview" not in name)}
    assert [line[:4] for line in done.err if line.startswith(("1/2 ", "2/2 "))] == ["1/2 ", "2/2 "]


def test_summary(first):
    evaluations = json.loads((first[0] / "summary.json").read_text(encoding="utf-8"))["evaluations"]
    assert evaluations.keys() == {"clip_score", "shapes_agreement"}
    for found in evaluations.values():
        assert found.keys() == {"before", "after", "gain", "ci95", "t", "n"} and found["n"] == 4
        assert found["gain"] == pytest.approx(found["after"] - found["before"]) and found["ci95"][0] <= found["gain"] <= found["ci95"][1]


def test_metrics(first):
    found = rows(first[0])
    asked = json.loads((first[0] / "prompt.json").read_text())["4"]["inputs"]
    assert [row["iteration"] for row in found] == [1, 2]
    warming = [asked["learning_rate"] * min(1, n / asked["warmup"]) for n in (1, 2)]
    assert [row["learning_rate"] for row in found] == pytest.approx(warming)
    for row in found:
        assert [key for key in KEYS if key not in row] == []
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, (int, float)))
        assert row["ratio_deviation"] == 0.0
        assert row["flat_groups"] == 0 and row["grad_norm"] > 0 and row["learning_rate"] > 0  # else the tests below say little
        parts = {"denoise", "decode", "reward", "update", "checkpoint", "total"}
        assert row["seconds"].keys() == parts and all(row["seconds"][part] >= 0 for part in parts)
        assert sum(row["seconds"][part] for part in parts - {"total"}) <= row["seconds"]["total"] + 1e-3


def test_denoiser_calls(first):
    """The first step of both groups in one call of 4; then 3 steps of 6 samples, in calls of 4 and 4; then 2 of 3 steps of 3 samples, in calls of 4 and
    4 for each of 2 optimizer steps, where samples of a group whose first step is trained share its row."""
    for row in rows(first[0]):
        calls = row["denoiser_calls"]
        assert row["transitions"] == 12 and (calls["forward"], calls["backward"]) == (4 + 3 * 8, 2 * 8)
        shared = calls["padded"] - (2 + 3 * 2) - (2 * 8 - 12)
        assert 0 <= shared <= 4


def test_the_preview_shows_every_iteration(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch, first):
    shown, contact_sheet = [], pictures.contact_sheet
    monkeypatch.setattr(pictures, "contact_sheet", lambda images: shown.append(contact_sheet(images)) or shown[-1])
    assert cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop).status == 0
    assert len(shown) == 2 and shown[0].tobytes() != shown[1].tobytes()
    assert Image.open(tmp_path / "quickstart/images/preview_8.png").tobytes() == shown[1].tobytes()
    assert_equal(trained(tmp_path / "quickstart"), trained(first[0]))  # what comes after the loop changes nothing in it


# -- equal runs ---------------------------------------------------------------------------------------------------------
def test_one_seed_twice_and_another(cli, quickstart, tiny, tmp_path, first):
    assert cli("run", quickstart, "--output", tmp_path, *tiny, "--run", "twice").status == 0
    assert_equal(trained(tmp_path / "twice"), trained(first[0]))
    assert json.loads((tmp_path / "twice/summary.json").read_text()) == json.loads((first[0] / "summary.json").read_text())
    assert cli("run", quickstart, "--output", tmp_path, *tiny, "--run", "other", "--seed", 1).status == 0
    (tensors, metrics), (of_first, metrics_of_first) = trained(tmp_path / "other"), trained(first[0])
    assert not any(torch.equal(tensors[name], of_first[name]) for name in tensors)
    assert all(a["reward_mean"] != b["reward_mean"] for a, b in zip(metrics, metrics_of_first))


@pytest.mark.parametrize("name", ["prompt.json", "images/before_after_00001_.png"])
def test_as_api_json_and_as_the_picture_that_a_run_saved(cli, tiny, tmp_path, first, name):
    """The API JSON holds the settings of the run; the picture holds the workflow as the editor saved it."""
    words = [] if name.endswith(".json") else tiny
    done = cli("run", first[0] / name, "--output", tmp_path, *words)
    assert done.status == 0, done.err
    assert_equal(trained(tmp_path / "quickstart"), trained(first[0]))


def test_under_inference_mode_as_in_comfyui(quickstart, tiny, tmp_path, first):
    from pathlib import Path

    from comfy_dancegrpo.trainer.session import Options, prepare
    from comfy_dancegrpo.workflow.execute import execute
    from comfy_dancegrpo.workflow.host import use

    host = prepare(Path(quickstart), Options(output=tmp_path, iterations=2, overrides=[word for word in tiny if "=" in word]))
    with use(host), torch.inference_mode():
        execute(host.prompt, host.registry, extra_pnginfo=host.extra_pnginfo)
    assert_equal(trained(tmp_path / "quickstart"), trained(first[0]))


def test_a_muted_preview_changes_nothing(cli, quickstart, saved, tiny, tmp_path, first):
    graph = json.loads(quickstart.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] in ("PreviewImage", "DanceGRPOEvaluate", "SaveImage"):
            node["mode"] = 2
    words = [w for pair in zip(tiny[::2], tiny[1::2]) if "Evaluate" not in pair[1] for w in pair]
    done = cli("run", saved(graph), "--output", tmp_path, *words)
    assert done.status == 0, done.err
    assert not (tmp_path / "quickstart/images").exists() and not (tmp_path / "quickstart/summary.json").exists()
    assert_equal(trained(tmp_path / "quickstart"), trained(first[0]))


# -- the run's folder is there already ----------------------------------------------------------------------------------
def test_a_finished_run_queued_again_trains_nothing_and_says_so(cli, quickstart, tiny, again, first):
    for path in (again / "run.json", again / "metrics.jsonl"):
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)  # the report tells when the run last changed, to the minute
    assert cli("report", again).status == 0
    before = {p: p.read_bytes() for p in again.rglob("*") if p.is_file() and p.parent.name != "lora"}
    done = cli("run", quickstart, "--output", again.parent, *tiny)
    assert done.status == 0 and sum("is finished and unchanged; nothing is trained" in line for line in done.err) == 1
    assert not any(line.startswith(("1/2 ", "2/2 ")) for line in done.err)
    assert [p.name for p, content in before.items() if p.read_bytes() != content] == []
    assert_equal(trained(again), trained(first[0]))  # written again; safetensors puts its metadata in any order
    assert [p.name for p in again.parent.iterdir()] == ["quickstart"]


def test_new_takes_the_next_name_when_something_changed(cli, loop_only, saved, tiny_loop, again):
    before = trained(again)
    assert cli("run", saved(loop_only), "--output", again.parent, *tiny_loop, "--seed", 3).status == 0
    assert sorted(p.name for p in again.parent.iterdir()) == ["quickstart", "quickstart-2"]
    assert_equal(trained(again), before)
    assert len(rows(again.parent / "quickstart-2")) == 2


def test_resume_with_more_iterations_is_the_longer_run(cli, loop_only, saved, tiny_loop, tmp_path, again):
    path = saved(loop_only)
    done = cli("run", path, "--output", again.parent, *tiny_loop, "--iterations", 4, "--set", "Loop Start.on_existing=resume")
    assert done.status == 0 and any("goes on after iteration 2" in line for line in done.err)
    assert cli("run", path, "--output", tmp_path / "whole", *tiny_loop, "--iterations", 4).status == 0
    assert_equal(trained(again), trained(tmp_path / "whole/quickstart"))


def test_restart_deletes_and_trains_afresh(cli, loop_only, saved, tiny_loop, again, first):
    (again / "images/left_over.png").write_bytes(b"")
    done = cli("run", saved(loop_only), "--output", again.parent, *tiny_loop, "--set", "Loop Start.on_existing=restart")
    assert done.status == 0 and not (again / "images/left_over.png").exists()
    assert_equal(trained(again), trained(first[0]))


def test_resume_of_a_changed_workflow_is_refused_with_the_difference(cli, loop_only, saved, tiny_loop, again):
    before = {p: p.read_bytes() for p in again.rglob("*") if p.is_file()}
    done = cli("run", saved(loop_only), "--output", again.parent, *tiny_loop, "--set", "Update.clip_range=0.01",
               "--set", "Loop Start.on_existing=resume")
    (line,) = done.verdict
    print(f"\n{line}")
    assert done.status == 3 and "was made by another workflow (Update.clip_range was 0.001 and is 0.01" in line
    assert {p: p.read_bytes() for p in again.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("how", ["resume", "restart"])
def test_a_folder_that_is_no_run_is_left_alone(cli, loop_only, saved, tiny_loop, tmp_path, how):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/thesis.txt").write_text("mine")
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--set", f"Loop Start.on_existing={how}")
    assert done.status == 3 and "exists and is not a run of this program" in done.verdict[0]
    assert [p.name for p in (tmp_path / "quickstart").iterdir()] == ["thesis.txt"]


# -- any node's numbers -------------------------------------------------------------------------------------------------
class Brightness:
    """As a pack that knows nothing of us may write it: a list of numbers, one a picture."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("FLOAT",), "measure", "theirs", (True,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "leave_out": ("INT", {"default": 0})}}

    def measure(self, image, leave_out):
        return ([float(picture.mean()) for picture in image[leave_out:]],)


@pytest.mark.parametrize("leave_out, status", [(0, 0), (1, 3)])
def test_numbers_of_another_packs_node_are_a_reward(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch, leave_out, status):
    monkeypatch.setitem(nodes.HOST_CLASS_MAPPINGS, "Brightness", Brightness)
    loop_only["20"] = {"class_type": "Brightness", "inputs": {"image": ["5", 1], "leave_out": leave_out}}
    loop_only["6"] = {"class_type": "DanceGRPOScoresFromNumbers",
                      "inputs": {"rollout": ["5", 0], "numbers": ["20", 0], "name": "brightness", "weight": 2.0}}
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop)
    assert done.status == status, done.err
    if status:
        assert 'node 6 "Scores From Numbers"' in done.verdict[0] and '"numbers": found 5 numbers, accepted: 6' in done.verdict[0]
        return
    for row in rows(tmp_path / "quickstart"):
        assert row["rewards"].keys() == {"brightness"} and row["reward_mean"] == pytest.approx(2 * row["rewards"]["brightness"]["mean"])
        assert row["flat_groups"] == 0 and row["ratio_deviation"] == 0.0
