"""The bundled workflows, each as it lies in the folder: they convert, are valid, run headless, and say what they need."""

import json

import pytest

from comfy_dancegrpo import nodes
from comfy_dancegrpo.workflow.convert import to_prompt
from comfy_dancegrpo.workflow.loop import check_loops
from comfy_dancegrpo.workflow.read import read_workflow
from comfy_dancegrpo.workflow.schema import object_info
from comfy_dancegrpo.workflow.validate import validate

REGISTRY = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
NOTES = {"Note", "MarkdownNote"}
MUTED = 2


def prompt_of(path):
    return to_prompt(read_workflow(path), object_info(REGISTRY, nodes.NODE_DISPLAY_NAME_MAPPINGS))


def test_they_convert_and_are_valid(bundled_here):
    prompt = prompt_of(bundled_here)
    validate(prompt, REGISTRY, check_files=False)  # one reads a LoRA that another makes
    check_loops(prompt, REGISTRY)
    saved = json.loads(bundled_here.read_text(encoding="utf-8"))["nodes"]
    assert set(prompt) == {str(node["id"]) for node in saved if node["type"] not in NOTES and node["mode"] != MUTED}
    for node in prompt.values():  # every widget's value was saved, none was filled in from the default
        assert REGISTRY[node["class_type"]].INPUT_TYPES().get("required", {}).keys() <= node["inputs"].keys()


def test_each_has_a_picture_and_a_note_that_tells_of_it(bundled):
    from PIL import Image

    with Image.open(bundled.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and 400 <= picture.width <= 800
    notes = [node["widgets_values"][0] for node in json.loads(bundled.read_text(encoding="utf-8"))["nodes"] if node["type"] in NOTES]
    assert len(notes) == 1 and notes[0].startswith("# ")


def test_one_that_needs_comfyui_says_so_and_which_node_is_missing(bundled_there, cli):
    graph = json.loads(bundled_there.read_text(encoding="utf-8"))
    assert any("ComfyUI" in node["widgets_values"][0].splitlines()[0] for node in graph["nodes"] if node["type"] in NOTES)
    missing = [node["type"] for node in graph["nodes"] if node["type"] not in REGISTRY.keys() | NOTES]
    done = cli("validate", bundled_there)
    assert done.status == 2 and len(done.verdict) == len(missing) > 0
    assert all(any(f"unknown node type {name!r}" in line for line in done.verdict) for name in missing)


@pytest.fixture(scope="module")
def run(cli, made_tiny, tmp_path_factory):
    """`run(path)`: runs a bundled workflow, made short, in a folder that all of them share."""
    folder = tmp_path_factory.mktemp("bundled")

    def run_tiny(path):
        file = folder / path.name
        file.write_text(json.dumps(made_tiny(prompt_of(path))), encoding="utf-8")
        return cli("run", file, "--output", folder / "output"), folder / "output"

    return run_tiny


def test_they_run_to_their_end(bundled_alone, quickstart, run):
    """After the quickstart, whose LoRA one of them reads."""
    done, output = run(quickstart)
    if bundled_alone != quickstart:
        before = set(output.rglob("*.png"))
        done, output = run(bundled_alone)
        assert set(output.rglob("*.png")) - before
    assert done.status == 0, done.err
    for node in prompt_of(bundled_alone).values():
        if node["class_type"] == "DanceGRPOLoopStart":
            name = node["inputs"]["run_name"]
            assert name == bundled_alone.stem and (output / name / "lora" / f"{name}.safetensors").is_file()


def test_the_comparison_gives_the_figures_that_the_run_itself_gave(quickstart, run):
    """Of a LoRA that came from its file, to the last digit; and where that is missing, one line says which."""
    compare = quickstart.with_name("compare_lora.json")
    trained, output = run(quickstart)
    figures = json.loads((output / "quickstart" / "summary.json").read_text(encoding="utf-8"))["evaluations"]
    done, _ = run(compare)
    for reward, summary in figures.items():
        line = next(line for line in done.out + done.err if line.strip().startswith(f"{reward}: "))
        assert f"{summary['before']:.4f} -> {summary['after']:.4f}, gain {summary['gain']:+.4f} (" in line
    assert json.loads((output / "quickstart" / "summary.json").read_text(encoding="utf-8"))["evaluations"] == figures


def test_the_comparison_names_the_file_that_is_missing(quickstart, cli, tmp_path):
    done = cli("validate", quickstart.with_name("compare_lora.json"), "--output", tmp_path)
    assert done.status == 2 and len(done.verdict) == 1
    assert "\"Load Policy LoRA\": input \"lora\": found 'quickstart/lora/quickstart.safetensors', which is in none of the folders" in done.verdict[0]
