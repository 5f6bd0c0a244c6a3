"""Rewards: the CLIP score against a computation of its own, and what is refused."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from loopback import Noting
from PIL import Image
from transformers import CLIPModel, PreTrainedTokenizerFast

from comfy_dancegrpo import processes, rewards
from comfy_dancegrpo.embedded import REWARD, shapes
from comfy_dancegrpo.errors import Interrupted, RunError
from comfy_dancegrpo.rewards import Reward
from comfy_dancegrpo.workflow.host import Host, use

CAPTIONS = [a.caption for a in shapes.every()[::97]]
PICTURES = torch.randint(256, (len(CAPTIONS), 64, 64, 3), generator=torch.Generator().manual_seed(0)) / 255
needs_model = pytest.mark.skipif(not (REWARD / "config.json").is_file(), reason="the embedded reward is not in this checkout")


@needs_model
def test_clip_score_is_the_cosine_of_the_embeddings():
    found = rewards.load("clip_score")(PICTURES, CAPTIONS)
    # the same from the parts of the model, in float64, with the preprocessing by hand: the embedded model's pictures are 64x64,
    # mean and deviation 0.5; its texts begin with token 606, end with 607, and are padded with 607 to 16
    model = CLIPModel.from_pretrained(REWARD).double().eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(REWARD / "tokenizer.json"))
    c = model.config.text_config
    ids = []
    for caption in CAPTIONS:
        words = [i for i in tokenizer(caption, add_special_tokens=False).input_ids if i not in (c.bos_token_id, c.eos_token_id)]
        assert len(words) <= c.max_position_embeddings - 2
        ids.append([c.bos_token_id, *words] + [c.eos_token_id] * (c.max_position_embeddings - 1 - len(words)))
    pixels = torch.from_numpy((PICTURES.numpy().astype(np.float64).transpose(0, 3, 1, 2) - 0.5) / 0.5)
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).numpy()
        hidden = model.text_model(input_ids=torch.tensor(ids)).last_hidden_state
        ends = [row.index(c.eos_token_id) for row in ids]
        text = model.text_projection(hidden[torch.arange(len(ids)), ends]).numpy()
    expected = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    assert found.dtype == torch.float32 and found.shape == (len(CAPTIONS),)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 1e-3


@needs_model
def test_a_picture_scores_as_it_would_be_saved():
    reward = rewards.load("clip_score")
    expected = reward(PICTURES[:4], CAPTIONS[:4])
    for change in (-0.4 / 255, 0.4 / 255):  # rounded, not cut, to 8 bits
        assert torch.equal(reward(PICTURES[:4] + change, CAPTIONS[:4]), expected)
    saturated = PICTURES[:4].round()
    assert torch.equal(reward(saturated * 3 - 1, CAPTIONS[:4]), reward(saturated, CAPTIONS[:4]))  # out of 0..1 is clipped, never wrapped


@needs_model
def test_a_picture_scores_the_same_in_any_batch():
    reward, together = rewards.load("clip_score"), rewards.load("clip_score", batch_size=16)(PICTURES, CAPTIONS)
    alone = torch.cat([reward(PICTURES[k:k + 1], CAPTIONS[k:k + 1]) for k in range(len(CAPTIONS))])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(rewards.load("clip_score", batch_size=4)(list(PICTURES), CAPTIONS), together, rtol=0, atol=1e-6)


def test_shapes_agreement():
    some = shapes.every()[::97]
    pictures = torch.stack([torch.from_numpy(np.asarray(shapes.draw(a)) / 255).float() for a in some])
    reward = rewards.load("shapes_agreement")
    assert reward(pictures, CAPTIONS).tolist() == [1.0] * len(some)
    turned = some[1:] + some[:1]
    expected = [np.mean([x == y for x, y in zip(astuple(a), astuple(b))]) for a, b in zip(some, turned)]
    np.testing.assert_allclose(reward(pictures, [a.caption for a in turned]), expected, atol=1e-6)


def test_jpeg_size_is_that_of_the_file_on_disk(tmp_path):
    flat = torch.full((64, 64, 3), 0.5)
    found = rewards.load("jpeg_size")([*PICTURES[:2], flat, PICTURES[0] + 0.4 / 255, torch.rand(33, 50, 3) * 3 - 1], ["any"] * 5)
    for name, picture in zip("abc", (PICTURES[0], PICTURES[1], flat)):
        Image.fromarray(np.rint(picture.numpy() * 255).astype(np.uint8)).save(tmp_path / f"{name}.jpg", quality=95)
    np.testing.assert_allclose(found[:3], [(tmp_path / f"{name}.jpg").stat().st_size / 1000 for name in "abc"], rtol=1e-6)
    assert found[2] < found[0] == found[3]


def constant(*values, form=torch.tensor):
    return Reward("mine", lambda pictures, prompts: form(list(values)))


@pytest.mark.parametrize("value, shown", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_is_no_number_is_named_with_its_prompt(value, shown):
    with pytest.raises(RunError) as error:
        constant(0.5, value)(PICTURES[:2], ["first", "second"])
    assert str(error.value) == f"reward 'mine': found {shown} for the prompt 'second'; accepted: finite numbers (2 tries)"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_picture_of_no_numbers_is_not_scored_as_a_black_one(value):
    pictures = PICTURES[:2].clone()
    pictures[1, 3, 4, 0] = value
    with pytest.raises(RunError) as error:
        rewards.load("jpeg_size")(pictures, ["first", "second"])
    assert str(error.value).startswith("reward 'jpeg_size': found a picture with NaN or infinite values for the prompt 'second'; accepted: finite numbers")


@pytest.mark.parametrize("values", [(), (0.5,), (0.5, 0.5, 0.5)])
def test_a_wrong_count(values):
    with pytest.raises(RunError) as error:
        constant(*values)(PICTURES[:2], ["first", "second"])
    assert str(error.value) == f"reward 'mine': found {len(values)} scores for 2 pictures"


def failing(times, make):
    """A reward whose first calls raise what `make()` gives; the sizes of all its calls; the first pixels are the scores."""
    sizes = []

    def function(pictures, prompts):
        sizes.append(len(prompts))
        if len(sizes) <= times:
            raise make()
        return pictures[:, 0, 0, 0]

    return Reward("mine", function, batch_size=4), sizes


def test_what_fails_once_is_tried_once_more():
    reward, sizes = failing(1, lambda: OSError("no answer"))
    with use(Noting()) as host:
        assert torch.equal(reward(PICTURES[:6], "abcdef"), PICTURES[:6, 0, 0, 0])
    assert sizes == [4, 4, 2] and host.said == ["reward 'mine': OSError: no answer; it is tried again"]
    reward, sizes = failing(9, lambda: OSError("no answer"))
    with pytest.raises(RunError, match=r"^reward 'mine': OSError: no answer \(2 tries\)$"):
        reward(PICTURES[:6], "abcdef")
    assert sizes == [4, 4]


@pytest.mark.parametrize("error", [RunError("a prompt without quotes"), Interrupted("stopped")])
def test_what_is_known_to_stay_wrong_and_a_stop_are_not_tried_again(error):
    reward, sizes = failing(9, lambda: error)
    with pytest.raises(type(error), match=str(error)):
        reward(PICTURES[:6], "abcdef")
    assert sizes == [4]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to allocate 20 GiB."), MemoryError(), RuntimeError("MPS backend out of memory")])
def test_short_of_memory_it_goes_on_in_halves(error, monkeypatch):
    sizes, emptied = [], []

    def hungry(pictures, prompts):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise error
        return pictures[:, 0, 0, 0]

    monkeypatch.setattr(processes, "empty_cache", lambda: emptied.append(len(sizes)))
    with use(Noting()) as host:
        assert torch.equal(Reward("mine", hungry, batch_size=7)(PICTURES[:7], "abcdefg"), PICTURES[:7, 0, 0, 0])
    assert sizes == [7, 3, 1, 2, 4, 2, 2] and emptied == [1, 2, 5]
    assert [line.partition("; it is")[2] for line in host.said] == [f" tried again with {half} at once" for half in (3, 1, 2)]
    assert all(line.startswith("reward 'mine': out of memory; lower") for line in host.said)


def test_short_of_memory_for_a_single_picture_it_stops():
    reward, sizes = failing(9, MemoryError)
    with pytest.raises(RunError, match=r"out of memory; lower .* \(2 tries\)$"):
        reward(PICTURES[:2], "ab")
    assert sizes == [2, 1, 1]


def test_a_function_is_called_without_gradients():
    weight = torch.ones(1, requires_grad=True)
    seen = []
    Reward("mine", lambda pictures, prompts: [seen.append((weight * 1).requires_grad) or 0.0 for _ in prompts])(PICTURES[:1], ["a"])
    assert seen == [False]


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda v: torch.tensor(v).double()[:, None]])
def test_numbers_of_any_kind(form):
    found = constant(0.25, 0.5, form=form)(PICTURES[:2], ["first", "second"])
    assert found.dtype == torch.float32 and found.tolist() == [0.25, 0.5]


def test_batches_are_of_the_size_asked_for_and_in_order():
    seen = []

    def function(pictures, prompts):
        seen.append(len(pictures))
        return [float(p) for p in prompts]

    found = Reward("mine", function, batch_size=4)(torch.zeros(10, 2, 2, 3), [str(k) for k in range(10)])
    assert seen == [4, 4, 2] and found.tolist() == list(range(10))


def test_a_model_that_is_missing_names_the_folders_searched(tmp_path):
    with use(Host(models=tmp_path)), pytest.raises(RunError, match="found 'big', which is in none of the folders searched") as error:
        rewards.load("clip_score", "big")
    assert str(tmp_path / "reward_models") in str(error.value)
    with use(Host(models=tmp_path)), pytest.raises(RunError):
        rewards.load("clip_score", "../../etc")


def test_the_host_decides_where_a_rewards_weights_are_and_is_asked_before_each_scoring():
    class Weights(torch.nn.Linear):
        def forward(self, pictures, prompts):
            return super().forward(pictures[:, 0, 0]).flatten()

    class Moving(Host):
        asked = 0

        def load(self, model):
            self.asked += 1
            super().load(model)

    with torch.inference_mode():
        reward, measured = Reward("weights", Weights(3, 1)), Reward("measured", lambda pictures, prompts: pictures[:, 0, 0, 0])
        assert [len(r.modules) for r in (reward, measured)] == [1, 0]
        with use(Moving()) as moving:
            for calls in (1, 2):
                assert reward(torch.zeros(2, 1, 1, 3), ["a", "b"]).shape == (2,) and moving.asked == calls
            measured(torch.zeros(2, 1, 1, 3), ["a", "b"])
    reward.to(torch.device("meta"))
    assert {p.device.type for p in reward.function.parameters()} == {"meta"}


def test_several_processes_on_one_device_are_told(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 4)
    with use(Noting()) as host:
        for device in ("", "cpu", "cuda"):
            rewards.load("jpeg_size", device=device)
        assert host.said == []
        assert rewards.load("jpeg_size", device="cuda:1").device == "cuda:1"
    (line,) = host.said
    assert line.startswith("reward 'jpeg_size': each of 4 processes loads it onto cuda:1")


def test_a_device_that_came_over_a_link_is_looked_at_too():
    with pytest.raises(RunError, match="^input \"device\": found 'the first', accepted: such as cpu"):
        rewards.load("jpeg_size", device="the first")
