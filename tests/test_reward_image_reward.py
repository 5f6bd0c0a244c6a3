"""ImageReward against its forward pass written out in float64 from the names in the published file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from comfy_dancegrpo import rewards
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.host import Host, use

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ring", "on", "blue", "##s"]
VISION, TEXT, TOKENS = 64, 128, len(WORDS) + 2  # widths: one and two heads of 64
PROMPTS = ["A red ring", "blue rings on [ENC] a ring", " ".join(["red ring"] * 30)]
IDS = [[2, 5, 6, 7, 3], [2, 9, 7, 10, 8, 12, 5, 7, 3], [2, *[6, 7] * 16, 6, 3]]  # [ENC] comes after the words and [DEC]; the last is cut at 35


@pytest.fixture(scope="module")
def tensors():
    """Of a tiny random ImageReward, by the names of THUDM's file."""
    torch.manual_seed(0)
    made = {}

    def linear(name, rows, columns):
        made[f"{name}.weight"], made[f"{name}.bias"] = torch.randn(rows, columns) / columns**0.5, torch.randn(rows) * 0.1

    def norm(name, width):
        made[f"{name}.weight"], made[f"{name}.bias"] = 1 + torch.randn(width) * 0.1, torch.randn(width) * 0.1

    eye = "blip.visual_encoder."
    made[f"{eye}cls_token"], made[f"{eye}pos_embed"] = torch.randn(1, 1, VISION), torch.randn(1, 197, VISION)
    made[f"{eye}patch_embed.proj.weight"], made[f"{eye}patch_embed.proj.bias"] = torch.randn(VISION, 3, 16, 16) / 28, torch.randn(VISION)
    for block in (f"{eye}blocks.{k}." for k in range(2)):
        norm(f"{block}norm1", VISION)
        linear(f"{block}attn.qkv", 3 * VISION, VISION)
        linear(f"{block}attn.proj", VISION, VISION)
        norm(f"{block}norm2", VISION)
        linear(f"{block}mlp.fc1", 96, VISION)
        linear(f"{block}mlp.fc2", VISION, 96)
    norm(f"{eye}norm", VISION)
    text = "blip.text_encoder."
    made[f"{text}embeddings.position_ids"] = torch.arange(64)[None]
    made[f"{text}embeddings.word_embeddings.weight"] = torch.randn(TOKENS, TEXT)
    made[f"{text}embeddings.position_embeddings.weight"] = torch.randn(64, TEXT)
    norm(f"{text}embeddings.LayerNorm", TEXT)
    for layer in (f"{text}encoder.layer.{k}." for k in range(2)):
        for attention, source in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}{attention}.self.key", TEXT, source)
            linear(f"{layer}{attention}.self.value", TEXT, source)
            linear(f"{layer}{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}intermediate.dense", 160, TEXT)
        linear(f"{layer}output.dense", TEXT, 160)
        norm(f"{layer}output.LayerNorm", TEXT)
    linear("blip.vision_proj", 16, VISION)
    linear("blip.text_proj", 16, TEXT)
    for place, rows, columns in ((0, 1024, TEXT), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        linear(f"mlp.layers.{place}", rows, columns)
    return made


@pytest.fixture
def models(tmp_path, tensors):
    """A `reward_models` folder with the file, and with the tokenizer's folder beside it."""
    folder = tmp_path / "reward_models"
    base = folder / "bert-base-uncased"
    base.mkdir(parents=True)
    (base / "vocab.txt").write_text("\n".join(WORDS))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    (base / "config.json").write_text(json.dumps({"model_type": "bert"}))
    torch.save(tensors, folder / "ImageReward.pt")
    with use(Host(models=tmp_path)):
        yield folder


def pictures():
    """Sizes of which the middle lies between pixels, and one that is already right."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(256, (*size, 3), generator=draw) / 255 for size in ((448, 455), (229, 224), (224, 224))]


def seen():
    """The same as the published preprocessing leaves them: 448x455 becomes 224x227 and loses columns 0, 1 and 226; 229x224 loses rows 0, 1, 226 and on."""
    first, second, third = [(p.numpy() * 255).round().astype(np.uint8) for p in pictures()]
    first = np.asarray(Image.fromarray(first).resize((227, 224), Image.BICUBIC))[:, 2:226]
    pixels = torch.from_numpy(np.stack([first, second[2:226], third])).double().permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double(), torch.tensor([0.26862954, 0.26130258, 0.27577711]).double()
    return (pixels - mean[:, None, None]) / std[:, None, None]


def expected(tensors):
    w = {name: value.double() for name, value in tensors.items() if value.is_floating_point()}
    f = torch.nn.functional

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(q, k, v, mask=None):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / 8
        return (scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)).softmax(-1).matmul(v).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder."
    x = f.conv2d(seen(), w[f"{eye}patch_embed.proj.weight"], w[f"{eye}patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([w[f"{eye}cls_token"].expand(len(x), 1, -1), x], 1) + w[f"{eye}pos_embed"]
    for block in (f"{eye}blocks.{k}." for k in range(2)):
        x = x + linear(f"{block}attn.proj", attend(*linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)))
        x = x + linear(f"{block}mlp.fc2", f.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6))))
    x = norm(f"{eye}norm", x, 1e-6)

    text = "blip.text_encoder."
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in IDS])
    y = w[f"{text}embeddings.word_embeddings.weight"][ids] + w[f"{text}embeddings.position_embeddings.weight"][:35]
    y = norm(f"{text}embeddings.LayerNorm", y, 1e-12)
    for layer in (f"{text}encoder.layer.{k}." for k in range(2)):
        for attention, source, mask in (("attention", None, ids != 0), ("crossattention", x, None)):
            at = f"{layer}{attention}."
            source = y if source is None else source
            heads = attend(linear(f"{at}self.query", y), linear(f"{at}self.key", source), linear(f"{at}self.value", source), mask)
            y = norm(f"{at}output.LayerNorm", linear(f"{at}output.dense", heads) + y, 1e-12)
        y = norm(f"{layer}output.LayerNorm", linear(f"{layer}output.dense", f.gelu(linear(f"{layer}intermediate.dense", y))) + y, 1e-12)
    y = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        y = linear(f"mlp.layers.{place}", y)
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_it_is_the_published_computation(models, tensors):
    found, right = rewards.load("image_reward", "ImageReward.pt")(pictures(), PROMPTS), expected(tensors)
    torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-5)
    assert right.std() > 0.01


def test_any_batch_size_is_the_same(models):
    sixteen, prompts = (pictures() * 6)[:16], (PROMPTS[::-1] * 6)[:16]
    together = rewards.load("image_reward", "ImageReward.pt", batch_size=16)(sixteen, prompts)
    torch.testing.assert_close(rewards.load("image_reward", "ImageReward.pt", batch_size=1)(sixteen, prompts), together, rtol=0, atol=1e-5)


def test_half_precision_is_of_the_file_alone(models, tensors):
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in tensors.items()}
    torch.save(halves, models / "half.pt")
    torch.testing.assert_close(rewards.load("image_reward", "half.pt")(pictures(), PROMPTS).double(), expected(halves), rtol=0, atol=1e-5)


def test_it_follows_the_precision_of_its_weights(models, tensors):
    reward = rewards.load("image_reward", "ImageReward.pt").loaded
    assert not reward.training and not any(p.requires_grad for p in reward.parameters())
    torch.testing.assert_close(reward.double()(pictures(), PROMPTS), expected(tensors), rtol=0, atol=1e-6)


@pytest.mark.parametrize("damage, line", [
    (lambda path, tensors: path.write_bytes(path.read_bytes()[:5000]), "it cannot be read as weights"),
    (lambda path, tensors: torch.save({"a.weight": torch.zeros(2)}, path), "found no blip.visual_encoder.… among its 1 tensors"),
    (lambda path, tensors: torch.save({k: v for k, v in tensors.items() if "blocks.1.norm1" not in k}, path),
     "it lacks 2 of 30 tensors, such as encoder.layers.1.layer_norm1.bias"),
    (lambda path, tensors: torch.save({**tensors, "mlp.layers.7.bias": torch.zeros(2)}, path), "layers.7.bias is [2], accepted: [1]"),
])
def test_another_file_is_one_line(models, tensors, damage, line):
    damage(models / "ImageReward.pt", tensors)
    with pytest.raises(RunError) as raised:
        rewards.load("image_reward", "ImageReward.pt")(pictures(), PROMPTS)
    assert line in str(raised.value) and "\n" not in str(raised.value) and "ImageReward.pt" in str(raised.value)


@pytest.mark.parametrize("words, count", [(None, 7), (WORDS[:-1], 12)], ids=["none", "another"])
def test_a_base_without_the_right_tokenizer_is_one_line(models, words, count):
    """Where there is none, transformers 5 makes up one of five tokens: every word would be unknown, and the scores of nothing."""
    vocabulary = models / "bert-base-uncased" / "vocab.txt"
    vocabulary.write_text("\n".join(words)) if words else vocabulary.unlink()
    with pytest.raises(RunError) as raised:
        rewards.load("image_reward", "ImageReward.pt")(pictures(), PROMPTS)
    accepted = [f"its tokenizer has {count} tokens with BLIP's two, accepted: 13, of which "] + ["its tokenizer cannot be loaded ("] * (words is None)  # older ones raise
    assert any(line in str(raised.value) for line in accepted) and "\n" not in str(raised.value)
    assert str(raised.value).endswith("google-bert/bert-base-uncased")


def test_a_damaged_tokenizer_is_one_line_that_names_what_is_accepted(models):
    (models / "bert-base-uncased" / "tokenizer.json").write_text("{")
    with pytest.raises(RunError, match=r"its tokenizer cannot be loaded \(.*\), accepted: that of google-bert/bert-base-uncased$") as raised:
        rewards.load("image_reward", "ImageReward.pt")(pictures(), PROMPTS)
    assert "\n" not in str(raised.value)
