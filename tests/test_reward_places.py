"""Where rewards' weights are looked for, and the one line that says what is missing."""

import json

import pytest
import torch

from comfy_dancegrpo import hub, rewards
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.rewards import Deferred, Kind, Reward
from comfy_dancegrpo.workflow.host import Host, use

TUNED = Kind("tuned", suffixes=(".pt",), base="someone/base-model", base_type="clip")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The empty `reward_models` of a host, beside an empty Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(rewards.REWARDS, "tuned", TUNED)
    folder = tmp_path / "reward_models"
    folder.mkdir()
    with use(Host(models=tmp_path)):
        yield folder


def folder(at, model_type):
    at.mkdir(parents=True)
    (at / "config.json").write_text(json.dumps({"model_type": model_type}))
    return at


def cache(models, name, model_type):
    repository = models.parent / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return folder(repository / "snapshots" / "abc", model_type)


def test_a_single_file_with_its_base_beside_it(models):
    (models / "tuned.pt").touch()
    base = folder(models / "base-model", "clip")
    assert rewards.source("tuned", TUNED, "tuned.pt") == rewards.Source(models / "tuned.pt", base)


def test_a_file_and_a_base_in_the_cache_of_hub_ids(models):
    weights = cache(models, "someone/tuned", "clip") / "tuned.pt"
    weights.touch()
    base = cache(models, "someone/base-model", "clip")
    assert rewards.source("tuned", TUNED, "someone/tuned/tuned.pt") == rewards.Source(weights, base)


@pytest.mark.parametrize("name", ["someone/tuned/{outside}", "someone/tuned/../../../outside.pt", "someone/..", "../tuned", "someone/tuned/C:/outside.pt",
                                  "someone/tuned/..\\outside.pt"])
def test_a_name_never_leaves_the_cache(models, name):
    snapshot = cache(models, "someone/tuned", "clip")
    for outside in (snapshot.parents[2] / "outside.pt", snapshot / "C:/outside.pt", snapshot / "..\\outside.pt"):  # as some system would read them
        outside.parent.mkdir(exist_ok=True)
        outside.touch()
    assert hub.cached("someone/tuned/config.json") == snapshot / "config.json"
    assert hub.cached(name.format(outside=snapshot.parents[2] / "outside.pt")) is None


def test_another_base_of_the_users_choice(models):
    (models / "tuned.pt").touch()
    mine = folder(models / "mine", "clip")
    assert rewards.source("tuned", TUNED, "tuned.pt", "mine").base == mine and rewards.available_bases() == ["published", "mine"]


@pytest.mark.parametrize("model, base, line", [
    ("other.pt", "published", 'input "model": found \'other.pt\', which is in none of the folders searched'),
    ("someone/other", "published", "and the Hugging Face cache"),
    ("tuned.txt", "published", "tuned.txt, accepted for tuned: a .pt file"),
    ("tuned.pt", "published", 'input "base": tuned needs the configuration and the tokenizer of someone/base-model'),
    ("tuned.pt", "language", "(model_type 'bert'), accepted for tuned: a transformers folder of model_type 'clip', such as someone/base-model"),
    ("language", "published", "(model_type 'bert'), accepted for tuned: a .pt file"),
    ("../reward_models/tuned.pt", "published", "which is in none of the folders searched"),
])
def test_what_is_missing_or_of_another_kind_is_one_line(models, model, base, line):
    for name in ("tuned.pt", "tuned.txt"):
        (models / name).touch()
    folder(models / "language", "bert")
    found = rewards.problem("tuned", model, base)
    assert line in found and "\n" not in found
    with pytest.raises(RunError):
        rewards.load("tuned", model, base=base)


@pytest.mark.parametrize("device, fits", [("", True), ("cpu", True), ("cuda:1", True), ("the first one", False), ("cuda:", False)])
def test_a_device(device, fits):
    found = rewards.problem("clip_score", "embedded", device=device)
    assert found is None if fits else found.startswith(f'input "device": found {device!r}, accepted: ')


def test_a_reward_is_loaded_when_it_first_scores_and_once():
    made = []
    reward = Reward("late", Deferred(lambda: made.append(1) or (lambda pictures, prompts: torch.zeros(len(prompts)))))
    assert made == []
    for _ in range(2):
        reward(torch.zeros(3, 2, 2, 3), ["a"] * 3)
    assert made == [1]


def test_a_device_of_its_own_beats_the_hosts():
    class Weights(torch.nn.Linear):
        def forward(self, pictures, prompts):
            return torch.zeros(len(prompts))

    reward = Reward("mine", Weights(1, 1), device="meta")
    reward.to(torch.device("cpu"))
    assert reward.loaded.weight.device.type == "meta"


def test_the_worst_frame():
    videos = [torch.tensor([0.9, 0.1, 0.5]).view(3, 1, 1, 1).expand(3, 2, 2, 3), torch.full((1, 2, 2, 3), 0.25)]
    brightness = lambda pictures, prompts: torch.stack([p.mean() for p in pictures])  # noqa: E731
    assert Reward("b", brightness)(videos, ["a", "b"]).tolist() == pytest.approx([0.5, 0.25])
    assert Reward("b", brightness, frame_score="worst")(videos, ["a", "b"]).tolist() == pytest.approx([0.1, 0.25])


def test_a_reward_of_whole_videos_is_given_them_whole():
    seen = []

    def function(videos, prompts):
        seen.extend(video.shape for video in videos)
        return torch.zeros(len(prompts))

    reward = Reward("v", function, whole_videos=True)
    reward([torch.zeros(5, 2, 2, 3), torch.zeros(9, 2, 2, 3)], ["a", "b"])
    reward(torch.zeros(2, 4, 4, 3), ["a", "b"])
    assert seen == [(5, 2, 2, 3), (9, 2, 2, 3), (1, 4, 4, 3), (1, 4, 4, 3)]
