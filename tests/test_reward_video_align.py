"""VideoAlign against Qwen2-VL's forward pass written out in float64, with the published instruction, sampling and preprocessing."""

import hashlib
import json
import math

import numpy as np
import pytest
import qwen2_vl
import torch
from safetensors.torch import save_file

from comfy_dancegrpo import rewards
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.rewards import video_align
from comfy_dancegrpo.rewards.qwen2_vl import fitted, video
from comfy_dancegrpo.workflow.host import Host, use

PROMPTS = ["a red ring rolls on blue", "a {small} fox, \"running\""]
INSTRUCTION = video_align.INSTRUCTION.read_text(encoding="utf-8")
MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
NORMS = {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121}
RANK, ALPHA = 4, 8
CONFIG = {
    "data_config": {"meta_data": "a", "data_dir": "b", "max_frame_pixels": 4 * 784, "num_frames": None, "fps": 2.0, "p_shuffle_frames": 0.0,
                    "eval_dim": ["VQ", "MQ", "TA"], "prompt_template_type": "detailed_special", "sample_type": "uniform"},
    "training_args": {},
    "model_config": {"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "vision_lora": False, "lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False},
    "inference_config": NORMS,
}


def test_the_instruction_is_the_published_one():
    """KwaiVGI/VideoAlign, prompt_template.py: DETAILED_PROMPT_WITH_SPECIAL_TOKEN; a changed blank changes scores."""
    assert hashlib.sha256(INSTRUCTION.encode()).hexdigest() == "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"


@pytest.mark.parametrize("count, fps, places", [
    (21, 8, [0, 4, 8, 12, 16, 20]),  # 5.25 frames at 2 a second, to pairs
    (53, 8, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]),  # 13.25
    (53, 24, [0, 17, 35, 52]),  # 4.4
    (5, 8, [0, 1, 3, 4]),  # never fewer than 4
    (3, 8, [0, 2]),  # as many pairs as there are
    (1, 8, [0]),
])
def test_which_frames_are_looked_at(count, fps, places):
    assert video_align.places(count, fps, 2.0) == places


@pytest.mark.parametrize("height, width, size", [(480, 832, (336, 588)), (720, 1280, (336, 588)), (256, 256, (336, 336)), (448, 448, (448, 448))])
def test_a_frame_has_at_most_448x448_pixels_and_at_least_128_tokens(height, width, size):
    assert fitted(height, width, video_align.LEAST, 448 * 448) == size


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base's folder, its tokenizer with the marks, the published tensors by their names, and the LoRA's."""
    base = tmp_path_factory.mktemp("made") / "Qwen2-VL-2B-Instruct"
    tokenizer = qwen2_vl.save_base(base, INSTRUCTION)
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    tensors, draw = qwen2_vl.tensors(len(tokenizer)), torch.Generator().manual_seed(1)
    tensors["rm_head.weight"] = torch.randn(1, qwen2_vl.WIDTH, generator=draw) / qwen2_vl.WIDTH**0.5
    lora = {}
    for name, value in tensors.items():
        if name.startswith("model.layers.") and value.ndim == 2:
            of = f"base_model.model.{name.removesuffix('.weight')}"
            lora[f"{of}.lora_A.weight"] = torch.randn(RANK, value.shape[1], generator=draw) / value.shape[1] ** 0.5
            lora[f"{of}.lora_B.weight"] = torch.randn(value.shape[0], RANK, generator=draw) * 0.3
    return base, tokenizer, tensors, lora


@pytest.fixture
def models(tmp_path, made):
    """A `reward_models` folder with the base and a whole VideoReward, as its makers publish it: the state of a PeftModel."""
    base, tokenizer, tensors, lora = made
    folder = tmp_path / "reward_models"
    folder.mkdir()
    (folder / base.name).symlink_to(base)
    checkpoint = folder / "VideoReward" / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    (folder / "VideoReward" / "checkpoint-9" / "model.pth").parent.mkdir()  # an earlier one, not to be taken
    (folder / "VideoReward" / "model_config.json").write_text(json.dumps(CONFIG))
    trained = {name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): value for name, value in lora.items()}
    with_lora = {name.split(".lora_")[0] for name in lora}
    for name, value in tensors.items():
        module, _, kind = f"base_model.model.{name}".rpartition(".")
        trained[f"{module}.base_layer.{kind}" if module in with_lora else f"{module}.{kind}"] = value
    torch.save(trained, checkpoint / "model.pth")
    with use(Host(models=tmp_path)):
        yield folder


def videos():
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(256, (21, 64, 96, 3), generator=draw) / 255, torch.randint(256, (5, 69, 41, 3), generator=draw) / 255]


def resized(frames, rows, columns):
    """[F, H, W, 3] in 0..1 to [F, 3, rows, columns] to 255: the program's, of which each was found to be a rounding of the bicubic filter
    (a = -0.5, widened where it shrinks) in float64; float32, as torchvision has it, errs by up to 0.001 before it rounds."""
    def matrix(before, after):
        scale = before / after
        wide = max(scale, 1.0)
        distance = np.abs((np.arange(before) + 0.5)[None] - ((np.arange(after) + 0.5) * scale)[:, None]) / wide
        weights = np.where(distance < 1, 1.5 * distance**3 - 2.5 * distance**2 + 1,
                           np.where(distance < 2, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2, 0))
        return weights / weights.sum(1, keepdims=True)

    exact = (frames.double().numpy() * 255).round().transpose(0, 3, 1, 2)
    exact = (matrix(exact.shape[2], rows) @ exact @ matrix(exact.shape[3], columns).T).clip(0, 255)
    found = video(frames, video_align.LEAST, CONFIG["data_config"]["max_frame_pixels"]).numpy()
    assert found.shape == exact.shape and np.array_equal(found, found.round()) and np.abs(found - exact).max() < 0.501
    return found


def expected(made, outputs=None):
    """[2, 3] raw scores."""
    _, tokenizer, tensors, lora = made
    weights = {name: value.double() for name, value in tensors.items()}
    for name in [name for name in lora if ".lora_A." in name]:
        of = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        weights[of] = weights[of] + ALPHA / RANK * lora[name.replace(".lora_A.", ".lora_B.")].double() @ lora[name].double()
    head, found = (weights["rm_head.weight"] if outputs is None else outputs.double()), []
    for clip, places, (rows, columns), prompt in zip(videos(), ([0, 4, 8, 12, 16, 20], [0, 1, 3, 4]), ((28, 56), (420, 252)), PROMPTS):
        frames = resized(clip[places], rows, columns)
        ids = qwen2_vl.tokens(tokenizer, "video", INSTRUCTION.replace("{text_prompt}", prompt), len(places) // 2 * rows * columns // 784)
        states = qwen2_vl.states(weights, ids, tokenizer.convert_tokens_to_ids("<|video_pad|>"), frames)
        at = states[[ids.index(tokenizer.convert_tokens_to_ids(mark)) for mark in MARKS]] @ head.T
        found.append(at[:, 0] if len(head) == 1 else at.diagonal())
    return torch.stack(found)


def test_raw_scores_are_the_published_computation(models, made):
    right = expected(made)
    for place, part in enumerate(("visual", "motion", "text")):
        found = rewards.load(f"video_align_{part}_raw", "VideoReward")(videos(), PROMPTS)
        torch.testing.assert_close(found.double(), right[:, place], rtol=0, atol=1e-5)
    torch.testing.assert_close(rewards.load("video_align_overall_raw", "VideoReward")(videos(), PROMPTS).double(), right.sum(1), rtol=0, atol=1e-5)
    assert right.std(0).min() > 0.01 and right.std(1).min() > 0.01


def test_normalised_scores(models, made):
    right = expected(made)
    right = torch.stack([(right[:, k] - NORMS[f"{short}_mean"]) / NORMS[f"{short}_std"] for k, short in enumerate(("VQ", "MQ", "TA"))], 1)
    for place, part in enumerate(("visual", "motion", "text")):
        found = rewards.load(f"video_align_{part}", "VideoReward")(videos(), PROMPTS)
        torch.testing.assert_close(found.double(), right[:, place], rtol=0, atol=1e-5)
    torch.testing.assert_close(rewards.load("video_align_overall", "VideoReward")(videos(), PROMPTS).double(), right.sum(1), rtol=0, atol=1e-5)


def test_an_adapter_with_what_else_was_trained_is_taken_too(models, made):
    base, _, tensors, lora = made
    together = rewards.load("video_align_overall", "VideoReward")(videos(), PROMPTS)
    whole = models / "whole base"  # the weights of the base, the vision tower and the tokens of before the training
    whole.mkdir()
    for file in base.iterdir():
        (whole / file.name).symlink_to(file)
    trained = {name: value for name, value in tensors.items() if name.startswith(("visual.", "rm_head.", "model.embed_tokens."))}
    before = {name: value * 0 if name in trained else value.clone() for name, value in tensors.items() if not name.startswith(("rm_head.", "lm_head."))}
    before["model.embed_tokens.weight"] = torch.zeros(1000, qwen2_vl.WIDTH)
    save_file(before, whole / "model-00001-of-00001.safetensors")
    checkpoint = models / "VideoReward" / "checkpoint-11352"
    (checkpoint / "model.pth").unlink()
    save_file(lora, checkpoint / "adapter_model.safetensors")
    torch.save({f"base_model.model.{name}": value for name, value in trained.items()}, checkpoint / "non_lora_state_dict.pth")
    torch.testing.assert_close(rewards.load("video_align_overall", "VideoReward", base="whole base")(videos(), PROMPTS), together, rtol=0, atol=1e-6)


def test_a_head_with_a_number_for_each_mark_is_asked_for_its_own(models, made):
    head = torch.randn(3, qwen2_vl.WIDTH, generator=torch.Generator().manual_seed(3)) / qwen2_vl.WIDTH**0.5
    file = models / "VideoReward" / "checkpoint-11352" / "model.pth"
    torch.save({**torch.load(file), "base_model.model.rm_head.weight": head}, file)
    (models / "VideoReward" / "model_config.json").write_text(json.dumps({**CONFIG, "model_config": {**CONFIG["model_config"], "output_dim": 3}}))
    found = rewards.load("video_align_overall_raw", "VideoReward")(videos(), PROMPTS)
    torch.testing.assert_close(found.double(), expected(made, head).sum(1), rtol=0, atol=1e-5)


def test_any_batch_size_is_the_same(models):
    sixteen, prompts = videos() * 8, (PROMPTS + PROMPTS[::-1]) * 4
    together = rewards.load("video_align_overall", "VideoReward", batch_size=16)(sixteen, prompts)
    torch.testing.assert_close(rewards.load("video_align_overall", "VideoReward", batch_size=1)(sixteen, prompts), together, rtol=0, atol=1e-5)


def test_parts_share_one_model_and_one_pass(models, monkeypatch):
    parts = [rewards.load(f"video_align_{part}", "VideoReward") for part in ("visual", "motion", "text")]
    assert len({id(part.loaded.model) for part in parts}) == 1
    passes, forward = [], parts[0].loaded.model.judge.forward
    monkeypatch.setattr(parts[0].loaded.model.judge, "forward", lambda *given: passes.append(1) or forward(*given))
    first = [part(videos(), PROMPTS) for part in parts]
    assert len(passes) == 1 and len({tuple(scores.tolist()) for scores in first}) == 3
    changed = videos()
    changed[0][4] = 1 - changed[0][4]  # a frame that is looked at
    assert not torch.equal(parts[0](changed, PROMPTS), first[0]) and len(passes) == 2
    parts[0](videos(), PROMPTS[::-1])
    assert len(passes) == 3


def test_the_frame_rate_says_how_much_time_a_video_takes(models):
    slow, fast = (rewards.load("video_align_motion", "VideoReward", fps=fps)(videos(), PROMPTS) for fps in (4, 8))
    assert slow[0] != fast[0]  # twice the time, twice the frames
    assert math.isclose(slow[1], fast[1], abs_tol=1e-5)  # of five frames four are looked at either way


def test_a_picture_is_a_still(models):
    still = torch.full((1, 30, 60, 3), 0.5)
    found = rewards.load("video_align_visual", "VideoReward")(still, PROMPTS[:1])
    assert found.shape == (1,) and found.isfinite().all()


def damaged(section, **options):
    return lambda folder: (folder / "model_config.json").write_text(json.dumps({**CONFIG, section: {**CONFIG[section], **options}}))


@pytest.mark.parametrize("damage, line", [
    (lambda folder: (folder / "checkpoint-11352" / "model.pth").write_bytes(b"PK\x03\x04 and no more"), "it cannot be read as weights"),
    (lambda folder: (folder / "checkpoint-11352" / "model.pth").unlink(), "has no weights; accepted: model.pth, or adapter_model.safetensors with"),
    (lambda folder: torch.save({"a.weight": torch.zeros(2)}, folder / "checkpoint-11352" / "model.pth"), "its tensors are no whole Qwen2-VL"),
    (lambda folder: (folder / "model_config.json").write_text("{}"), "is no configuration of VideoAlign"),
    (damaged("data_config", sample_type="multi_pts"), "data_config.sample_type is 'multi_pts', accepted: 'uniform', as published"),
    (lambda folder: (folder / "model_config.json").write_text(json.dumps({**CONFIG, "inference_config": {"VQ_mean": 0, "VQ_std": 1}})),
     "is no configuration of VideoAlign (KeyError: 'MQ_mean')"),
])
def test_another_folder_is_one_line(models, damage, line):
    damage(models / "VideoReward")
    with pytest.raises(RunError) as raised:
        rewards.load("video_align_visual", "VideoReward")(videos(), PROMPTS)
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_a_checkpoint_without_a_number_counts_where_no_other_has_one(models):
    folder = models / "VideoReward"
    numbered = rewards.load("video_align_visual", "VideoReward")(videos(), PROMPTS)
    (folder / "checkpoint-final").mkdir()  # empty: not to be taken
    assert torch.equal(rewards.load("video_align_visual", "VideoReward")(videos(), PROMPTS), numbered)
    (folder / "checkpoint-9").rmdir()
    (folder / "checkpoint-final").rmdir()
    (folder / "checkpoint-11352").rename(folder / "checkpoint-final")
    assert torch.equal(rewards.load("video_align_visual", "VideoReward")(videos(), PROMPTS), numbered)


def test_without_the_makers_figures_there_are_raw_scores_alone(models):
    less = {name: value for name, value in CONFIG.items() if name != "inference_config"}
    (models / "VideoReward" / "model_config.json").write_text(json.dumps(less))
    with pytest.raises(RunError, match="choose video_align_text_raw"):
        rewards.load("video_align_text", "VideoReward")(videos(), PROMPTS)
    assert rewards.load("video_align_text_raw", "VideoReward")(videos(), PROMPTS).isfinite().all()


def test_what_is_missing_is_said_before_anything_is_loaded(models):
    (models / "VideoReward" / "model_config.json").unlink()
    found = rewards.problem("video_align_visual", "VideoReward")
    assert "accepted for video_align_visual: a folder with model_config.json" in found and "KwaiVGI/VideoReward" in found
