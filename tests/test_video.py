"""Videos through the whole path: rewards, nodes, previews, files, and a headless run of a tiny Wan policy from its graph."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfy_dancegrpo import nodes
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
from comfy_dancegrpo.nodes.comfy_core import PreviewImage
from comfy_dancegrpo.nodes.rewards import Score
from comfy_dancegrpo.nodes.save_video import SaveVideo
from comfy_dancegrpo.rewards import Reward, spread
from comfy_dancegrpo.runs import live, video
from comfy_dancegrpo.runs.evaluate import Comparison, Evaluation
from comfy_dancegrpo.runs.folder import RunFolder
from comfy_dancegrpo.runs.pictures import before_after, contact_sheet, save_animation, to_image, to_tensor
from comfy_dancegrpo.workflow.convert import to_prompt
from comfy_dancegrpo.workflow.execute import execute
from comfy_dancegrpo.workflow.host import Host, use
from comfy_dancegrpo.workflow.read import read_workflow
from comfy_dancegrpo.workflow.schema import object_info
from comfy_dancegrpo.workflow.validate import validate
from families import wan
from PIL import Image
from safetensors.torch import load_file

REGISTRY = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}


def brightness(pictures, prompts):
    """Of a picture the mean of its pixels."""
    return torch.stack([p.mean() for p in pictures])


def videos(*shape):
    """Soft pictures that move: what 4:2:0 keeps."""
    rough = torch.rand(shape[0], 3, 2, 2, 3, generator=generator("video"))
    return torch.nn.functional.interpolate(rough, shape[1:4], mode="trilinear").movedim(1, -1)


# -- rewards ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "most", "places"), [
    (1, 8, [0]), (5, 8, [0, 1, 2, 3, 4]), (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]), (81, 5, [0, 20, 40, 60, 80]), (9, 1, [4]), (53, 2, [0, 52])])
def test_frames_are_spread_from_the_first_to_the_last(count, most, places):
    assert spread(count, most) == places


def test_a_video_scores_the_mean_of_its_frames():
    levels = torch.arange(9.0).view(1, 9, 1, 1, 1) * torch.tensor([0.1, 0.05]).view(2, 1, 1, 1, 1)
    moving = levels.expand(2, 9, 4, 4, 3)
    seen = []

    def watched(pictures, prompts):
        seen.append(tuple(prompts))
        return brightness(pictures, prompts)

    scores = Reward("r", watched, batch_size=4, frames=3)(moving, ["a", "b"])  # frames 0, 4 and 8
    torch.testing.assert_close(scores, torch.tensor([0.4, 0.2]))
    assert seen == [("a", "a", "a", "b"), ("b", "b")]
    lengths = Reward("r", brightness)([moving[0, :3], moving[0, 8:]], ["a", "b"])
    torch.testing.assert_close(lengths, torch.tensor([0.1, 0.8]))


# -- the Score node -----------------------------------------------------------------------------------------------------
def scored(pictures, images):
    prompts, frames = ("a",) * len(pictures), len(pictures[0]) if pictures.ndim == 5 else 1
    rollout = SimpleNamespace(pictures=pictures, prompts=prompts, own_prompts=prompts, size=len(pictures), places=torch.arange(len(pictures)), early=None,
                              plan=SamplingPlan(None, size=Size(8, 8, frames)))
    return Score().score(rollout=[rollout], reward=[Reward("r", brightness)], weight=[1.0], images=images)[0].columns[0].raw


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 5, 8, 8, 3)], ids=["pictures", "videos"])
def test_score_takes_what_group_sample_gives_and_what_nodes_make_of_it(shape):
    pictures = torch.rand(shape, generator=generator("pictures"))
    expected = pictures.flatten(1).mean(1)
    torch.testing.assert_close(scored(pictures, None), expected)
    given = list(pictures) if pictures.ndim == 5 else [pictures]
    torch.testing.assert_close(scored(pictures * 0, given), expected)
    stills = pictures if pictures.ndim == 4 else pictures[:, 2]
    if pictures.ndim == 4:
        torch.testing.assert_close(scored(pictures * 0, [stills]), expected)
    else:
        with pytest.raises(RunError, match="found 1 videos, accepted: 4"):  # one video of four frames, not a frame of each of four
            scored(pictures, [stills])
    torch.testing.assert_close(scored(pictures, [still[None] for still in stills]), stills.flatten(1).mean(1))


@pytest.mark.parametrize(("shape", "found"), [((4, 8, 8, 3), "3 pictures"), ((4, 5, 8, 8, 3), "3 videos")])
def test_a_wrong_number_of_images_is_named(shape, found):
    pictures = torch.rand(shape)
    with pytest.raises(RunError, match=f'input "images": found {found}, accepted: 4, one for each sample'):
        scored(pictures, list(pictures[:3]) if pictures.ndim == 5 else [pictures[:3]])


# -- files --------------------------------------------------------------------------------------------------------------
def test_an_mp4_is_read_back(tmp_path):
    frames = videos(1, 9, 32, 48)[0]
    video.write(frames, tmp_path / "a.mp4", 24.0)
    found, fps = video.read(tmp_path / "a.mp4")
    assert found.shape == frames.shape and fps == 24.0
    assert (found - frames).abs().mean() < 0.02 and (found - frames.flip(0)).abs().mean() > 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_odd_sizes_gain_a_row_and_a_column(tmp_path):
    frames = videos(1, 5, 32, 48)[0][:, :31, :47]
    video.write(frames, tmp_path / "a.mp4", 12.5)
    found, fps = video.read(tmp_path / "a.mp4")
    assert found.shape == (5, 32, 48, 3) and fps == 12.5
    assert (found[:, :31, :47] - frames).abs().mean() < 0.02


def test_an_animation_has_every_frame(tmp_path):
    frames = videos(1, 5, 32, 64)[0]
    save_animation(frames, tmp_path / "a.webp", 10, longest=32)
    with Image.open(tmp_path / "a.webp") as shown:
        assert (shown.format, shown.n_frames, shown.size, shown.info["loop"]) == ("WEBP", 5, (32, 16), 0)


@pytest.mark.parametrize("prefix", ["../out", "/out", "a/../../out", "C:out", "folder/"])
def test_save_video_stays_in_its_folder(tmp_path, prefix):
    with use(Host(output=tmp_path / "output")):
        assert "accepted: a name that stays within the output folder" in SaveVideo.VALIDATE_INPUTS(prefix)
        with pytest.raises(RunError, match="filename_prefix"):
            SaveVideo().save(videos(1, 5, 16, 16)[0], 16.0, prefix)
    assert list(tmp_path.rglob("*.mp4")) == []


def test_save_video_counts_on_and_shows_an_animation_where_there_are_pages(tmp_path):
    with use(Host(output=tmp_path)) as host:
        host.preview_folder = tmp_path / "temp"
        host.preview_folder.mkdir()
        shown = [SaveVideo().save(videos(1, 5, 16, 16)[0], 16.0, "v")["ui"]["images"][0] for _ in range(2)]
    assert sorted(p.name for p in tmp_path.glob("*.mp4")) == ["v_00001_.mp4", "v_00002_.mp4"]
    for image in shown:
        assert Image.open(tmp_path / "temp" / image["filename"]).n_frames == 5 and image["type"] == "temp"


# -- what a page shows --------------------------------------------------------------------------------------------------
def test_the_live_group_of_videos_moves_and_of_pictures_does_not(tmp_path):
    folder = RunFolder(tmp_path)
    for iteration, (shape, kind, frames) in enumerate([((2, 5, 16, 16, 3), "webp", 5), ((2, 16, 16, 3), "jpg", 1)], 1):
        rollout = SimpleNamespace(every_picture=torch.rand(shape), groups=torch.zeros(2), prompts=("a", "a"),
                                  plan=SamplingPlan(None, size=Size(8, 8, shape[1] if len(shape) == 5 else 1)))
        scores = SimpleNamespace(rollout=rollout, total=torch.tensor([0.0, 1.0]), columns=(SimpleNamespace(name="r"),))
        live.write(folder, iteration, 2, 0.0, SimpleNamespace(advantages=SimpleNamespace(scores=scores, values=torch.tensor([-1.0, 1.0]))))
        files = sorted(p.name for p in folder.live.iterdir() if p.suffix != ".json")
        assert files == [f"{iteration}-0.{kind}", f"{iteration}-1.{kind}"]  # the former ones are gone
        assert getattr(Image.open(folder.live / files[0]), "n_frames", 1) == frames


@pytest.mark.parametrize("pages", [False, True])
def test_a_preview_shows_the_middle_frame_of_every_video_and_all_pictures_of_a_batch(tmp_path, pages):
    for moving in (videos(3, 5, 16, 16), videos(3, 5, 16, 16)[:, 2]):
        stills = list(moving if moving.ndim == 4 else moving[:, 2])
        graph = {"1": {"class_type": "Given", "inputs": {}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
        given = [moving] if moving.ndim == 4 else list(moving)
        with use(Host(REGISTRY, output=tmp_path)) as host:
            host.preview_folder, told = tmp_path / "temp" if pages else None, []
            host.node_output = lambda node_id, ui: told.extend(ui["images"])
            (tmp_path / "temp").mkdir(exist_ok=True)
            execute(graph, REGISTRY, outputs=["2"], preset={("1", 0): given})
        if pages:
            shown = [np.asarray(Image.open(tmp_path / "temp" / image["filename"])) for image in told]
            assert len(shown) == 3 and all((picture == to_image(still)).all() for picture, still in zip(shown, stills))
        else:
            assert told == [] and Image.open(tmp_path / "preview_2.png").tobytes() == contact_sheet(stills).tobytes()


def test_a_preview_of_nothing_is_one_line(tmp_path):
    with use(Host(output=tmp_path)), pytest.raises(RunError, match='input "images": found none'):
        PreviewImage().preview([], ["2"])


def test_the_grid_shows_the_middle_frame():
    moving = torch.rand(2, 5, 16, 16, 3, generator=generator("grid"))
    grid = before_after(Evaluation(("a", "b"), (Comparison("r", torch.zeros(2), torch.ones(2)),), moving, moving), 2, 1)
    still = before_after(Evaluation(("a", "b"), (Comparison("r", torch.zeros(2), torch.ones(2)),), moving[:, 2], moving[:, 2]), 2, 1)
    assert torch.equal(to_tensor(grid), to_tensor(still))
    assert to_image(moving[0]).tobytes() == to_image(moving[0, 2]).tobytes()


# -- graphs -------------------------------------------------------------------------------------------------------------
def test_graphs_saved_before_there_were_frames_are_as_they_were(quickstart, saved):
    """The bundled workflow, whose Group Sample and Evaluate hold no value for it, in both formats."""
    info = object_info(REGISTRY, nodes.NODE_DISPLAY_NAME_MAPPINGS)
    graph = json.loads(quickstart.read_text(encoding="utf-8"))
    old = {"DanceGRPOGroupSample": 9, "DanceGRPOEvaluate": 10}
    for node in graph["nodes"]:
        if node["type"] in old:
            node["widgets_values"] = node["widgets_values"][:old[node["type"]]]
            node["inputs"] = [entry for entry in node["inputs"] if entry["name"] != "frames"]
    prompt = to_prompt(read_workflow(saved(graph)), info)
    assert [node["inputs"]["frames"] for node in prompt.values() if node["class_type"] in old] == [1, 1]
    for node in prompt.values():
        node["inputs"].pop("frames", None)
    validate(to_prompt(read_workflow(saved(prompt)), info), REGISTRY)


def test_a_model_of_pictures_makes_no_video(cli, loop_only, saved, tmp_path):
    loop_only["5"]["inputs"]["frames"] = 5
    done = cli("run", saved(loop_only), "--output", tmp_path / "out", "--iterations", 1)
    assert done.status == 3 and 'inputs "width", "height" and "frames": found 64x64 pixels in 5 frames, accepted: multiples of 8 in one frame' in done.err[-1]


def test_a_run_of_wan_trains_on_videos_saves_its_lora_and_writes_mp4s(cli, loop_only, saved, tmp_path):
    wan.wan21().save_pretrained(tmp_path / "models" / "diffusers" / "wan")
    graph = loop_only
    graph["1"]["inputs"] |= {"policy": "wan"}
    graph["4"]["inputs"] |= {"run_name": "video", "prompts_per_iteration": 1, "micro_batch": 2, "lora_rank": 2, "lora_targets": "attention", "warmup": 0}
    graph["5"]["inputs"] |= {"group_size": 2, "steps": 3, "shift": 3.0, "eta": 0.5, "guidance_scale": 5.0, "width": 32, "height": 32, "frames": 5}
    graph["8"] = {"class_type": "DanceGRPOSaveVideo", "inputs": {"images": ["5", 1], "fps": 16.0, "filename_prefix": "sample"}}
    done = cli("run", saved(graph), "--output", tmp_path / "out", "--models", tmp_path / "models", "--iterations", 2)
    assert done.status == 0, done.err
    run = tmp_path / "out" / "video"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(row["ratio_deviation"] == 0.0 and row["grad_norm"] > 0 for row in rows)
    keys = load_file(run / "lora" / "video.safetensors")
    assert len(keys) == 2 * 2 * 8 and all(key.startswith("diffusion_model.blocks.") for key in keys)  # A and B, two blocks, 8 layers
    assert any(value.any() for key, value in keys.items() if ".lora_B." in key)
    files = sorted((run / "videos").glob("*.mp4"))
    assert [p.name for p in files] == [f"sample_{n:05d}_.mp4" for n in (1, 2, 3, 4)]  # two iterations of a group of two
    for path in files:
        frames, fps = video.read(path)
        assert frames.shape == (5, 32, 32, 3) and fps == 16.0
    shown = [Image.open(path) for path in (run / "live").glob("*.webp")]
    assert len(shown) == 2 and {image.n_frames for image in shown} == {5}
