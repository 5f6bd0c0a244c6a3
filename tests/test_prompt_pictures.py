"""Prompts with reference pictures: read from files, told apart, and part of what a run is."""

import json

import numpy as np
import pytest
import torch
from comfy_dancegrpo import prompts
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.nodes.prompt_set import PromptSet
from comfy_dancegrpo.prompts import Prompt
from comfy_dancegrpo.workflow.host import Host, use
from families import flux_kontext
from PIL import Image

TEXTS = ["a large red circle", "a small blue star", "a large green ring"]


@pytest.fixture
def given(tmp_path):
    """An input folder with a picture beside a .jsonl and a .csv file that name it."""
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / "one.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "two.png")
    lines = [{"prompt": TEXTS[0], "image": "one.png"}, {"prompt": TEXTS[1], "image": "two.png"}, {"prompt": TEXTS[2]}]
    (tmp_path / "set" / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "set" / "all.csv").write_text(f"prompt,image\n{TEXTS[0]},one.png\n{TEXTS[1]},two.png\n{TEXTS[2]},\n")
    with use(Host(input=tmp_path)):
        yield tmp_path


@pytest.mark.parametrize("file", ["set/all.jsonl", "set/all.csv"])
def test_pictures_beside_the_file_and_in_the_input_folder(given, file):
    found = prompts.read(file)
    assert list(map(str, found)) == TEXTS and found[2].picture is None
    assert [p.picture.image().getpixel((0, 0)) for p in found[:2]] == [(255, 0, 0), (0, 0, 255)]


def test_a_prompt_is_its_text_and_its_picture(given):
    first, second, _ = prompts.read("set/all.jsonl")
    other = Prompt(str(first), second.picture)
    assert first == Prompt(str(first), first.picture) and first != other and first != str(first) and len({first, other}) == 2
    assert first.with_text("").picture == first.picture and Prompt("x") == "x" and hash(Prompt("x")) == hash("x")


@pytest.mark.parametrize("content, line", [
    ({"prompt": "x", "image": "nowhere.png"}, "found the \"image\" 'nowhere.png', which is in none of the folders searched"),
    ({"prompt": "x", "image": "../two.png"}, "which is in none of the folders searched"),
    ({"prompt": "x", "image": 3}, 'line 1: accepted: the path of a picture as "image"'),
])
def test_pictures_that_are_not_there(given, content, line):
    (given / "bad.jsonl").write_text(json.dumps(content))
    with pytest.raises(RunError) as error:
        prompts.read("bad.jsonl")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_picture(given):
    (given / "two.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    broken = prompts.read("set/all.jsonl")[1].picture
    with pytest.raises(RunError, match=r"the reference picture .*two\.png cannot be read: "):
        broken.image()


def test_comfyui_reads_the_set_again_when_a_picture_changes(given):
    before = PromptSet.IS_CHANGED("", "set/all.jsonl", 0)
    assert PromptSet.IS_CHANGED("", "set/all.jsonl", 0) == before
    Image.new("RGB", (9, 9), "green").save(given / "two.png")
    assert PromptSet.IS_CHANGED("", "set/all.jsonl", 0) != before


def read(text="", file="", limit=0, image=None):
    return PromptSet().read(text, file, limit, image)[0].prompts


def test_one_picture_of_a_wire_is_for_all_that_have_none(given):
    image = torch.tensor([0.2, 0.4, 0.6]).expand(1, 3, 5, 3)
    first, second, third = read(file="set/all.jsonl", image=image)
    assert [p.picture.image().getpixel((0, 0)) for p in (first, second, third)] == [(255, 0, 0), (0, 0, 255), (51, 102, 153)]
    assert third.picture.image().size == (5, 3) and third.picture.image().mode == "RGB"


def test_a_batch_of_a_wire_is_one_for_each_in_order_and_is_told_apart_by_its_pixels():
    images = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))  # an alpha channel is left out
    found, again, other = read("a\nb\nc", limit=2, image=images), read("a\nb", image=images.clone()), read("a\nb", image=images.flip(0))
    assert found == again and found != other and len({p.picture.digest() for p in found}) == 2
    assert {p.picture.digest() for p in found} == {p.picture.digest() for p in other}
    assert np.array_equal(np.asarray(found[1].picture.image()), (images[1, ..., :3].numpy() * 255).round().astype(np.uint8))
    with pytest.raises(RunError, match='^input "image": found 2 pictures, accepted: one for all, or 3, one for each prompt$'):
        read("a\nb\nc", image=images)


def test_a_wire_s_picture_is_drawn_from_as_a_file_s(cli, given, tmp_path_factory):
    """In a graph: Load Image, Prompt Set, and an editing model that draws."""
    models = tmp_path_factory.mktemp("models")
    flux_kontext.flux_kontext().save_pretrained(models / "diffusers" / "kontext")
    written = {}
    for name in ("wire", "file"):
        prompts_of = {"class_type": "DanceGRPOPromptSet", "inputs": {"text": TEXTS[0], "file": "", "limit": 0, "image": ["9", 0]}}
        if name == "file":
            (given / "edit.jsonl").write_text(json.dumps({"prompt": TEXTS[0], "image": "two.png"}), encoding="utf-8")
            prompts_of["inputs"] = {"text": "", "file": "edit.jsonl", "limit": 0}
        graph = {
            "1": {"class_type": "DanceGRPOLoadPolicy", "inputs": {"policy": "kontext", "dtype": "float32"}}, "2": prompts_of,
            "3": {"class_type": "DanceGRPOSample", "inputs": {"policy": ["1", 0], "prompts": ["2", 0], "steps": 2, "guidance_scale": 2.5, "width": 64,
                                                             "height": 64, "frames": 1, "noise_seed": 0, "samples_per_prompt": 1}},
            "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": name}},
            **({"9": {"class_type": "LoadImage", "inputs": {"image": "two.png"}}} if name == "wire" else {})}
        flow = tmp_path_factory.mktemp(name) / "flow.json"
        flow.write_text(json.dumps(graph), encoding="utf-8")
        output = flow.parent / "output"
        done = cli("run", flow, "--models", models, "--input", given, "--output", output)
        assert done.status == 0, done.err
        written[name] = np.asarray(Image.open(next(output.rglob(f"{name}_*.png"))))
    assert np.array_equal(written["wire"], written["file"]) and np.ptp(written["wire"]) > 0


def test_a_run_is_of_its_pictures(cli, tiny_loop, loop_only, given, tmp_path_factory):
    """The content counts, not the place: a folder that was moved is resumed, a picture that was changed is another run."""
    for node in loop_only.values():
        if node["class_type"] == "DanceGRPOPromptSet":
            node["inputs"] |= {"text": "", "file": "set/all.jsonl"}
    flow = tmp_path_factory.mktemp("flow") / "flow.json"
    flow.write_text(json.dumps(loop_only), encoding="utf-8")
    words = (flow, *tiny_loop, "--output", tmp_path_factory.mktemp("runs"), "--set", "Loop Start.on_existing=resume")
    done = cli("run", *words, "--input", given)
    assert done.status == 0 and any("'embedded' sees no pictures: those of 2 of 3 prompts are ignored" in line for line in done.err)
    moved = tmp_path_factory.mktemp("moved") / "given"
    given.rename(moved)
    assert cli("run", *words, "--input", moved).status == 0
    Image.new("RGB", (8, 8), "green").save(moved / "two.png")
    refused = cli("run", *words, "--input", moved)
    assert refused.status == 3 and "was made by another workflow (its prompts have changed)" in refused.verdict[0]
