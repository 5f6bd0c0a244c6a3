"""Prompts with reference pictures: read from files, told apart, and part of what a run is."""

import json

import pytest
from comfy_dancegrpo import prompts
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.nodes.prompt_set import PromptSet
from comfy_dancegrpo.prompts import Prompt
from comfy_dancegrpo.workflow.host import Host, use
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


def test_a_run_is_of_its_pictures(cli, tiny_loop, loop_only, given, tmp_path_factory):
    """The content counts, not the place: a folder that was moved is resumed, a picture that was changed is another run."""
    for node in loop_only.values():
        if node["class_type"] == "DanceGRPOPromptSet":
            node["inputs"] |= {"text": "", "file": "set/all.jsonl"}
    flow = tmp_path_factory.mktemp("flow") / "flow.json"
    flow.write_text(json.dumps(loop_only), encoding="utf-8")
    words = (flow, *tiny_loop, "--output", tmp_path_factory.mktemp("runs"), "--set", "Loop Start.on_existing=resume")
    assert cli("run", *words, "--input", given).status == 0
    moved = tmp_path_factory.mktemp("moved") / "given"
    given.rename(moved)
    assert cli("run", *words, "--input", moved).status == 0
    Image.new("RGB", (8, 8), "green").save(moved / "two.png")
    refused = cli("run", *words, "--input", moved)
    assert refused.status == 3 and "was made by another workflow (its prompts have changed)" in refused.verdict[0]
