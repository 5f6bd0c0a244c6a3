"""`dancegrpo check-reward`: scores of pictures beside published ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_dancegrpo import rewards
from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.runs import video
from comfy_dancegrpo.trainer import checking
from comfy_dancegrpo.trainer.commands import app
from PIL import Image
from typer.testing import CliRunner

CIRCLE, SQUARE = "a small red circle", "a large blue square"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 48, 3), dtype=np.uint8)).save(path)
    return path


def score(path, prompt, name="clip_score"):
    return rewards.load(name)(torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)[None], [prompt]).item()


def run(*arguments):
    return CliRunner().invoke(app, ["check-reward", *map(str, arguments)])


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_ours_beside_the_published_with_the_difference(picture, form):
    circle, square = score(picture, CIRCLE), score(picture, SQUARE)
    rows = [{"reward": "clip_score", "picture": "https://example.com/a/one.webp?raw=true", "prompt": CIRCLE, "score": round(circle + 0.25, 6),
             "weights": "someone/Embedded", "source": "https://example.com/readme"},
            {"reward": "clip_score", "picture": "one.png", "prompt": SQUARE, "score": round(square, 6)},
            {"reward": "jpeg_size", "picture": "one.png", "prompt": "of another reward", "score": 1},
            {"reward": "clip_score", "picture": "two.png", "prompt": "of another picture", "score": 1}]
    table = picture.with_name(f"table.{form}")
    lines = [",".join(rows[0]), *(",".join(f'"{row.get(key, "")}"' for key in rows[0]) for row in rows)] if form == "csv" else map(json.dumps, rows)
    table.write_text("\n".join(lines))
    result = run("clip_score", picture, "--published", table)
    assert result.exit_code == 0
    head, first, second, *published = result.stdout.splitlines()
    assert head.split() == ["ours", "published", "difference"]
    assert first.split(maxsplit=3) == [f"{circle:.4f}", f"{circle + 0.25:.4f}", "-0.2500", f"one.png  {CIRCLE}"]
    assert second.split(maxsplit=3) == [f"{square:.4f}", f"{square:.4f}", second.split()[2], f"one.png  {SQUARE}"]
    assert abs(float(second.split()[2])) < 1e-4
    assert published == ["published for someone/Embedded: https://example.com/readme", "published"]


@pytest.mark.parametrize("weights, model, comparable", [
    ("xswu/HPSv2/HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt", False), ("xswu/HPSv2/HPS_v2_compressed.pt", "HPS_v2_compressed.pt", True),
    ("xswu/HPSv2/HPS_v2_compressed.pt", "converted/HPS_v2_compressed.safetensors", True),
    ("openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14", False), ("openai/clip-vit-base-patch32", "clip-vit-base-patch32", True),
    ("openai/clip-vit-base-patch32", "embedded", False), ("", "embedded", True), ("HPS_v2.1", "", True),
])
def test_which_weights_are_compared(weights, model, comparable):
    row = checking.Checked(Path("one.png"), "a cat", 0.5, checking.Published("r", "one.png", "a cat", 0.25, weights, "a page"), model)
    head, told, note = checking.lines([row])
    assert told.split() == ["0.5000", "0.2500", *(["+0.2500"] if comparable else []), "one.png", "a", "cat"]
    assert (f"; not compared with ours, which are by {model!r}: " in note) != comparable


def test_published_scores_of_other_weights_have_no_difference(picture):
    picture.rename(cats := picture.with_name("000000039769.jpg"))
    result = run("clip_score", cats)
    _, *rows, note, _ = result.stdout.splitlines()  # the scores have a source each
    assert result.exit_code == 0 and [row.split()[1:3] for row in rows] == [["0.2457", cats.name], ["0.1930", cats.name]]
    assert note.startswith("published for openai/clip-vit-base-patch32: https://") and "; not compared with ours, which are by 'embedded': " in note


def test_a_prompt_of_ones_own_and_rewards_that_need_none(picture):
    result = run("clip_score", picture, "--prompt", CIRCLE)
    assert result.stdout.splitlines()[1].split(maxsplit=1) == [f"{score(picture, CIRCLE):.4f}", f"one.png  {CIRCLE}"]
    result = run("jpeg_size", picture, picture, "--prompt", "")
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [f"{score(picture, '', 'jpeg_size'):.4f}"] * 2


def test_a_video(tmp_path):
    path = tmp_path / "clip.mp4"
    video.write(torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0)), path, 8)
    expected = rewards.load("jpeg_size")([video.read(path)[0]], [""]).item()
    assert run("jpeg_size", path, "--prompt", "").stdout.splitlines()[1].split() == [f"{expected:.4f}", "clip.mp4"]


def test_a_reward_of_whole_videos_is_told_each_videos_frame_rate(tmp_path, picture, monkeypatch):
    for rate in (12, 24):
        video.write(torch.zeros(5, 32, 32, 3), tmp_path / f"{rate}.mp4", rate)
    seen = []

    def load(name, model, fps, **options):
        def reward(samples, prompts):
            seen.append((fps, samples[0].ndim))
            return torch.zeros(1)
        return reward

    monkeypatch.setattr(rewards, "load", load)
    checking.check("jpeg_size", [tmp_path / "24.mp4", tmp_path / "12.mp4", picture], "", None, "embedded", "published", "")
    assert seen == [(24, 4), (12, 4), (rewards.FPS, 3)]


@pytest.mark.parametrize("arguments, line", [
    (["nothing", "{picture}"], "input \"reward\": found 'nothing', accepted: one of 'clip_score', 'aesthetic', "),
    (["clip_score", "{picture}"], "one.png: found no prompt for it, accepted: --prompt TEXT"),
    (["clip_score", "{table}", "--prompt", "a"], "table.csv: it cannot be read as a picture or a video ("),
    (["clip_score", "{picture}", "--prompt", "a", "--model", "nowhere"], 'input "model": found \'nowhere\', which is in none of the folders'),
    (["hps_v2", "{picture}", "--prompt", "a"], "published: HPS_v2.1_compressed.pt of huggingface.co/xswu/HPSv2"),
    (["clip_score", "{picture}", "--prompt", "a", "--device", "the first"], 'input "device": found \'the first\''),
    (["clip_score", "{picture}", "--published", "{table}"], "table.csv, row 1: found {'reward': 'clip_score', 'picture': 'one.png', 'score': 'high'}"),
    (["clip_score", "{picture}", "--published", "{nowhere}"], "nowhere.csv, which cannot be read"),
])
def test_what_cannot_be_checked_is_one_line(picture, arguments, line):
    table = picture.with_name("table.csv")
    table.write_text("reward,picture,score\nclip_score,one.png,high\n")
    result = run(*(a.format(picture=picture, table=table, nowhere=picture.with_name("nowhere.csv")) for a in arguments))
    assert result.exit_code == 2 and line in result.stderr and result.stderr.count("\n") == 1


def test_the_projects_own_table_is_whole():
    rows = checking.read(None)
    assert {row.reward for row in rows} <= rewards.REWARDS.keys()
    assert all(row.prompt and row.weights and row.score is not None for row in rows)
    assert all(address.startswith(("https://", "http://images.cocodataset.org/")) for row in rows for address in (row.picture, row.source))
    assert len({(row.reward, row.weights, row.picture, row.prompt) for row in rows}) == len(rows)


def test_a_picture_of_the_projects_own_table_has_its_prompts(picture):
    cats = picture.rename(picture.with_name("000000039769.jpg"))
    first, second = checking.check("clip_score", [cats], None, None, "embedded", "published", "cpu")
    assert (first.prompt, second.prompt) == ("a photo of a cat", "a photo of a dog") and first.published.weights == "openai/clip-vit-base-patch32"
    with pytest.raises(WorkflowError, match="found no prompt"):
        checking.check("jpeg_size", [cats], None, None, "embedded", "published", "cpu")
