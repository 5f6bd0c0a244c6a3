"""The rewards on CLIP's towers, from tiny files in the published form, against float64 computations of their own."""

import html
import json
import math
import pickle

import ftfy
import numpy as np
import open_clip
import pytest
import tiny
import torch
from comfy_dancegrpo import rewards
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.rewards.weights import read
from comfy_dancegrpo.workflow.host import Host, use
from PIL import Image
from transformers import CLIPConfig, CLIPModel

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POSITIONS = 16
SIZES = [(56, 56), (80, 56), (56, 112), (131, 77), (40, 40), (31, 50), (300, 200), (64, 64)] * 2
PICTURES = [torch.rand(*size, 3, generator=torch.Generator().manual_seed(k)) for k, size in enumerate(SIZES)]
PROMPTS = ["a small red circle", "A  LARGE Blue\nsquare", "it's 4 &amp;amp; 5", "schÃ¶n", "", "a green triangle on the left " * 4, "0 < 1", "a ring"]
PROMPTS += reversed(PROMPTS)
LAION, OPENAI = "CLIP-ViT-H-14-laion2B-s32B-b79K", "clip-vit-large-patch14"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The empty `reward_models` of a host, beside an empty Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "reward_models").mkdir()
    with use(Host(models=tmp_path)):
        yield tmp_path / "reward_models"


def config(eos=None):
    tokenizer = tiny.clip_tokenizer()
    return CLIPConfig(**open_clip.transformers_config(len(tokenizer), POSITIONS, tokenizer.eos_token_id if eos is None else eos))


def base_folder(at, eos=None, side=open_clip.SIDE):
    """Configuration, tokenizer and preprocessing, and no weights."""
    config(eos).save_pretrained(at)
    tiny.clip_tokenizer().save_pretrained(at)
    (at / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": side, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": side,
        "image_mean": MEAN, "image_std": STD, "feature_extractor_type": "CLIPFeatureExtractor"}))  # as the published ones have it
    return at


def stored(seed=0):
    return open_clip.state_dict(len(tiny.clip_tokenizer()), POSITIONS, seed)


def ids(prompts, clean=True):
    """As the published tokenizer makes them: cleaned, in lower case, begun and ended, cut, padded with 0."""
    tokenizer, found = tiny.clip_tokenizer(), []
    for prompt in prompts:
        if clean:
            prompt = " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).strip().split()).lower()
        words = tokenizer(prompt, add_special_tokens=False).input_ids[: POSITIONS - 2]
        row = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
        found.append(row + [0] * (POSITIONS - len(row)))
    return found


def normalised(squares):
    return (np.stack(squares).transpose(0, 3, 1, 2) - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))


def saved(picture):
    return Image.fromarray(np.rint(picture.numpy() * 255).astype(np.uint8))


def padded(picture, side=open_clip.SIDE):
    """HPS v2's: the longer side to `side` by Pillow's bicubic filter in floats, in the middle of black."""
    image, canvas = np.asarray(saved(picture), np.float32) / 255, np.zeros((side, side, 3))
    height, width = (round(n * side / max(image.shape[:2])) for n in image.shape[:2])
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top: top + height, left: left + width] = np.stack([np.asarray(c) for c in channels], axis=-1)
    return canvas


def cropped(picture, middle, side=open_clip.SIDE):
    """CLIP's: the shorter side to `side` by Pillow's bicubic filter in 8 bits, the middle cut out; `middle` places it, of how much is left over."""
    image = saved(picture)
    short = min(image.size)
    image = image.resize(tuple(int(side * n / short) for n in image.size), Image.Resampling.BICUBIC)
    left, top = (middle(n - side) for n in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side))) / 255


def torchvision(left_over):
    """As its CenterCrop rounds, in the code of OpenAI's CLIP and of OpenCLIP."""
    return int(round(left_over / 2.0))


def transformers(left_over):
    return left_over // 2


def same_in_any_batch(name, model, scale=1):
    together = rewards.load(name, model, batch_size=16)(PICTURES, PROMPTS)
    alone = rewards.load(name, model, batch_size=1)(PICTURES, PROMPTS)
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=2e-6 * scale)
    return together.numpy()


@pytest.mark.parametrize("eos", [None, 2], ids=["eos by its id", "eos by the highest id"])  # 2 is what older configurations say
def test_hps_v2(models, eos):
    base_folder(models / LAION, eos)
    torch.save({"state_dict": stored()}, models / "HPS_v2.1_compressed.pt")
    found = same_in_any_batch("hps_v2", "HPS_v2.1_compressed.pt")
    pixels = normalised([padded(p) for p in PICTURES])
    expected = (open_clip.encode_image(stored(), pixels) * open_clip.encode_text(stored(), ids(PROMPTS))).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 0.01


def test_clip_score_of_an_open_clip_checkpoint(models):
    base_folder(models / LAION)
    torch.save({f"module.{name}": value for name, value in stored().items()}, models / "open_clip_pytorch_model.bin")
    found = same_in_any_batch("clip_score", "open_clip_pytorch_model.bin")
    pixels = normalised([cropped(p, torchvision) for p in PICTURES])
    expected = (open_clip.encode_image(stored(), pixels) * open_clip.encode_text(stored(), ids(PROMPTS))).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 0.01


def clip_folder(at, seed=0):
    """A whole published folder; returns its model in float64."""
    model = tiny.seeded(CLIPModel, config(), seed=seed)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)  # so that pictures and prompts are told apart
    model.save_pretrained(base_folder(at))
    return CLIPModel.from_pretrained(at).double().eval()


def test_pickscore(models):
    model = clip_folder(models / "PickScore_v1")
    found = same_in_any_batch("pickscore", "PickScore_v1", 100)
    with torch.no_grad():
        pixels = torch.from_numpy(normalised([cropped(p, transformers) for p in PICTURES]))
        expected = model(input_ids=torch.tensor(ids(PROMPTS, clean=False)), pixel_values=pixels).logits_per_image.diagonal()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * 100)  # of cosines times 100
    assert np.ptp(expected.numpy()) > 1


def test_pickscore_with_the_tokenizer_of_its_base(models):
    clip_folder(models / "PickScore_v1")
    expected = rewards.load("pickscore", "PickScore_v1")(PICTURES, PROMPTS)
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (models / "PickScore_v1" / file).unlink()
    base_folder(models / LAION)
    assert torch.equal(rewards.load("pickscore", "PickScore_v1", base=LAION)(PICTURES, PROMPTS), expected)


def layers(width, seed=0):
    """As sac+logos+ava1-l14-linearMSE.pth: five matrices under the numbers that dropout left."""
    generator, widths = torch.Generator().manual_seed(seed), (width, 1024, 128, 64, 16, 1)
    shapes = zip((0, 2, 4, 6, 7), widths, widths[1:])
    return {key: value for i, a, b in shapes for key, value in (
        (f"layers.{i}.weight", torch.randn(b, a, generator=generator) / a**0.5), (f"layers.{i}.bias", torch.randn(b, generator=generator)))}


def test_aesthetic(models):
    model = clip_folder(models / OPENAI)
    torch.save(layers(open_clip.DIM), models / "sac+logos+ava1-l14-linearMSE.pth")
    found = same_in_any_batch("aesthetic", "sac+logos+ava1-l14-linearMSE.pth")
    with torch.no_grad():
        seen = model.vision_model(pixel_values=torch.from_numpy(normalised([cropped(p, torchvision) for p in PICTURES]))).pooler_output
    x = seen.numpy() @ model.visual_projection.weight.detach().numpy().T
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    weights = {name: value.double().numpy() for name, value in layers(open_clip.DIM).items()}
    for i in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{i}.weight"].T + weights[f"layers.{i}.bias"]
    np.testing.assert_allclose(found, x[:, 0], rtol=0, atol=1e-5)
    assert np.ptp(x) > 0.01
    assert rewards.load("aesthetic", "sac+logos+ava1-l14-linearMSE.pth")(PICTURES[:1], ["another"]).item() == found[0]


def test_other_precisions_and_devices(models):
    base_folder(models / LAION)
    torch.save({"state_dict": {name: value.half() for name, value in stored().items()}}, models / "half.pt")
    reward = rewards.load("hps_v2", "half.pt")
    expected = reward(PICTURES, PROMPTS)
    assert {p.dtype for p in reward.loaded.parameters()} == {torch.float32} and not any(p.requires_grad for p in reward.loaded.parameters())
    reward.loaded.to(torch.bfloat16)
    found = reward(PICTURES, PROMPTS)
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.05
    reward.to(torch.device("meta"))
    assert {p.device.type for p in reward.loaded.parameters()} == {"meta"}


class Fun:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("name, fault", {
    "truncated": "cannot be read as weights",
    "code": "cannot be read as weights",
    "empty": "found no weights in it",
    "another": "it lacks 76 of 78 tensors, such as logit_scale",
    "more": "it has 1 tensors more than 78, such as score_predictor.weight",
    "larger": "vision_model.embeddings.position_embedding.weight is [257, 32], accepted: [17, 32], as the configuration tells",
}.items())
def test_a_file_that_is_no_hps_is_one_line(models, name, fault, capsys):
    base_folder(models / LAION)
    file, good = models / f"{name}.pt", stored()
    contents = {"truncated": good, "empty": {}, "code": {"state_dict": good, "more": Fun()}, "more": good | {"score_predictor.weight": torch.ones(2)},
                "another": {name: good[name] for name in ("ln_final.weight", "ln_final.bias")},
                "larger": good | {"visual.positional_embedding": torch.ones(257, 32)}}[name]
    file.write_bytes(pickle.dumps(contents, protocol=2)) if name == "code" else torch.save(contents, file)
    if name == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(RunError) as error:
        rewards.load("hps_v2", file.name).loaded
    assert fault in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False], ids=["of today", "of before 1.6"])
def test_a_damaged_file_is_one_line_wherever_it_is_damaged(tmp_path, zipped):
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": {"a": torch.ones(3, 4), "b": torch.ones(5)}}, file, _use_new_zipfile_serialization=zipped)
    whole, draw = file.read_bytes(), np.random.default_rng(0)
    for cut in draw.integers(1, len(whole) - 1, 200):
        file.write_bytes(whole[:cut])
        with pytest.raises(RunError, match="cannot be read as weights|found no weights in it"):
            read(file)


@pytest.mark.parametrize("fault, line", {
    "weights damaged": "transformers cannot load it as a CLIP model",
    "weights of another": "transformers cannot load it as a CLIP model",
    "tensors missing": "its weights lack 1 tensors, such as visual_projection.weight",
    "no tokenizer": "it has no tokenizer.json, and no vocab.json with merges.txt",
}.items())
def test_a_folder_that_is_no_clip_is_one_line(models, fault, line):
    from safetensors.torch import load_file, save_file

    clip_folder(models / "PickScore_v1")
    file = models / "PickScore_v1" / "model.safetensors"
    tensors = load_file(file)
    if fault == "weights damaged":
        file.write_bytes(file.read_bytes()[:1000])
    elif fault == "no tokenizer":
        (models / "PickScore_v1" / "tokenizer.json").unlink()
    else:
        tensors.pop("visual_projection.weight")
        if fault == "weights of another":
            tensors["visual_projection.weight"] = torch.ones(3, 3)
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RunError) as error:
        rewards.load("pickscore", "PickScore_v1").loaded
    assert line in str(error.value) and str(models / "PickScore_v1") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, model, line", [
    ("hps_v2", "embedded", "a .pt file or a .safetensors file; published: HPS_v2.1_compressed.pt of huggingface.co/xswu/HPSv2"),
    ("hps_v2", "file.pt", "needs the configuration and the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which is in none"),
    ("aesthetic", "file.pth", "needs all of openai/clip-vit-large-patch14, which is in none"),
    ("aesthetic", "nowhere", "; published: sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"),
    ("pickscore", "embedded", "found 'embedded', accepted for pickscore: a transformers folder of model_type 'clip'; published: the folder"),
    ("pickscore", "nowhere", "; published: the folder yuvalkirstain/PickScore_v1 of huggingface.co"),
    ("clip_score", "nowhere", "; published: such as openai/clip-vit-large-patch14 of huggingface.co"),
])
def test_a_missing_file_is_named_as_it_was_published(models, name, model, line):
    (models / "file.pt").touch()
    (models / "file.pth").touch()
    found = rewards.problem(name, model)
    assert line in found and "\n" not in found
