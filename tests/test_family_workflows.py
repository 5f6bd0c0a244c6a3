"""The bundled workflows of the model families: written from one table, valid, and run with tiny models under the published names."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import families
import family_workflows as tool
import pytest
import reference_pictures
from comfy_dancegrpo.embedded import PROMPTS, REWARD
from comfy_dancegrpo.policies import FAMILIES
from families import flux, flux2, flux_kontext, hunyuan_video, ltx, ltx2, qwen_image, qwen_image_edit, sd3, skyreels, stable_diffusion, wan, z_image

ROOT = Path(__file__).resolve().parent.parent


def case(module, name: str) -> families.Case:
    return next(case for case in module.CASES if case.name == name)


TINY = {
    # workflow -> the case of tests/support/families that stands in for its model
    "sd15": case(stable_diffusion, "sd15-pndm"), "sdxl": case(stable_diffusion, "sdxl-euler"), "sd35": case(sd3, "sd3.5"),
    "flux_dev": case(flux, "flux-dev"), "flux_kontext": case(flux_kontext, "flux-kontext"), "flux2": case(flux2, "flux-2-dev"),
    "qwen_image": case(qwen_image, "qwen-image"), "qwen_image_edit": case(qwen_image_edit, "qwen-image-edit"), "z_image": case(z_image, "z-image"),
    "wan21": case(wan, "wan-2.1"), "wan22": case(wan, "wan-2.2-a14b"), "hunyuan_video": case(hunyuan_video, "hunyuan-video"),
    "skyreels_i2v": case(skyreels, "skyreels"), "ltx_video": case(ltx, "ltx"), "ltx2": case(ltx2, "ltx-2"),
}


@dataclass(frozen=True)
class Found:
    """A family's workflow, and the folders in which its models are, tiny, under the names that the workflow has."""

    name: str
    path: Path
    models: Path
    case: families.Case


@pytest.fixture(scope="module", params=TINY)
def found(request, tmp_path_factory):
    name, models = request.param, tmp_path_factory.mktemp("models")
    TINY[name].build().save_pretrained(models / "diffusers" / tool.FAMILIES[name].policy)
    shutil.copytree(REWARD, models / "reward_models" / tool.REWARD)
    return Found(name, ROOT / "workflows" / f"{name}.json", models, TINY[name])


def small(found: Found) -> list[str]:
    """The words that make its run short; the numbers of frames keep their kind, a video or a picture."""
    frames = found.case.size.frames if tool.FAMILIES[found.name].size[2] > 1 else 1
    size = {"width": found.case.size.width, "height": found.case.size.height, "frames": frames}
    values = {
        "Load Policy.dtype": "float32", "Loop Start.prompts_per_iteration": 1, "Loop Start.lora_rank": 2,
        "Group Sample.group_size": 2, "Group Sample.steps": 3, "Update.optimizer_steps": 1, "Held-out Prompts.limit": 1, "Evaluate.steps": 2,
        "Sample (by the model's own pipeline).steps": 2,
        **{f"{node}.{what}": value for node in ("Group Sample", "Evaluate", "Sample (by the model's own pipeline)") for what, value in size.items()},
    }
    if tool.FAMILIES[found.name].advantage:
        values["Advantage.best_of"] = 2
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def test_there_is_one_for_every_family():
    modules = {FAMILIES[type(case.build()).__name__][0] for case in TINY.values()}
    assert {module for module, _ in FAMILIES.values()} == modules
    assert TINY.keys() == tool.FAMILIES.keys()


@pytest.mark.parametrize("name", tool.FAMILIES)
def test_it_is_what_the_tool_writes(name):
    """After a change of a node or of the table: python tools/family_workflows.py"""
    assert (ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8") == tool.text_of(name)


def test_the_page_has_the_table_that_the_tool_writes():
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.table() in page and tool.page_with_table(page) == page


@pytest.mark.parametrize("name", tool.FAMILIES)
def test_without_its_models_each_is_named_in_a_line_with_how_to_get_it(name, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    done = cli("validate", ROOT / "workflows" / f"{name}.json", "--models", tmp_path, "--output", tmp_path / "output")
    policy = tool.FAMILIES[name].policy
    assert done.status == 2 and len(done.verdict) == 2
    assert f"input \"policy\": found '{policy}', which is in none of the folders searched" in done.verdict[0]
    assert done.verdict[0].endswith(f"; nothing is downloaded by itself: hf download {policy}")
    assert f"; nothing is downloaded by itself: hf download {tool.REWARD}" in done.verdict[1]


def test_its_published_size_is_one_that_the_family_makes_and_its_prompts_have_pictures_where_it_needs_them(found):
    from comfy_dancegrpo import policies, prompts
    from comfy_dancegrpo.grpo.protocol import Size
    from comfy_dancegrpo.workflow.host import Host, use

    family = tool.FAMILIES[found.name]
    with use(Host(models=found.models)):
        policy = policies.load(family.policy)
        width, height, frames = family.size
        if found.name != "sd35":  # its table of positions is as large as the tiny model needs
            policy.latent_shape(Size(height, width, frames))
        for part in ("train", "test"):
            policy.check(prompts.read(f"{family.prompt_file}_{part}.{tool.SUFFIXES[family.prompt_file]}"))


def test_it_runs_from_end_to_end(found, cli, tmp_path):
    with found.case.within():
        valid = cli("validate", found.path, "--models", found.models, "--output", tmp_path)
        assert valid.status == 0, valid.err
        done = cli("run", found.path, "--models", found.models, "--output", tmp_path, "--iterations", "1", *small(found))
    assert done.status == 0, done.err
    run = tmp_path / found.name
    metrics = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert metrics["iteration"] == 1 and metrics["ratio_deviation"] == 0.0
    loras = {path.stem for path in (run / "lora").glob("*.safetensors")}
    assert loras == ({"wan22_high_noise", "wan22_low_noise"} if found.name == "wan22" else {found.name})
    drawn = {path.suffix for folder in ("images", "videos") for path in (run / folder).glob("tuned_*")}
    assert drawn == ({".mp4"} if tool.FAMILIES[found.name].size[2] > 1 else {".png"})


def test_wan_22_is_validated_trained_and_drawn_with_from_a_file_for_each_expert(cli, tmp_path):
    """Of the workflow nothing but the values of Load Policy is another."""
    here, models, path = TINY["wan22"], tmp_path / "models", ROOT / "workflows" / "wan22.json"
    folder = models / "diffusers" / "rest"
    here.build().save_pretrained(folder)
    shutil.copytree(REWARD, models / "reward_models" / tool.REWARD)
    (models / "diffusion_models").mkdir()
    for component, name in (("transformer", "high"), ("transformer_2", "low")):
        shutil.move(folder / component / "diffusion_pytorch_model.safetensors", models / "diffusion_models" / f"{name}.safetensors")
    where = ("--models", models, "--output", tmp_path)
    one = ("--set", "Load Policy.policy=high.safetensors")
    lacks = cli("validate", path, *where, *one)
    assert lacks.status == 2 and lacks.verdict[0].endswith('; accepted: a file at input "transformer_2", or those weights'), lacks.err
    both = (*one, "--set", "Load Policy.transformer_2=low.safetensors")
    valid = cli("validate", path, *where, *both, "--memory")
    assert valid.status == 0 and any("weights of the denoiser" in line for line in valid.out + valid.err), valid.err
    done = cli("run", path, *where, *both, "--iterations", "1", *small(Found("wan22", path, models, here)))
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "wan22" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["ratio_deviation"] == 0.0
    assert {file.stem for file in (tmp_path / "wan22" / "lora").glob("*.safetensors")} == {"wan22_high_noise", "wan22_low_noise"}
    drawn = cli("sample", "--policy", "high.safetensors", "--transformer-2", "low.safetensors", *where, "--prompt", "x", "--width", here.size.width,
                "--height", here.size.height, "--frames", here.size.frames, "--steps", 2)
    assert drawn.status == 0 and Path(drawn.out[0]).suffix == ".mp4", drawn.err


@pytest.mark.parametrize("files", sorted({family.prompt_file for family in tool.FAMILIES.values()}))
def test_no_prompt_is_held_out_and_trained_on(files):
    from comfy_dancegrpo import prompts

    train, test = (prompts.read(f"{files}_{part}.{tool.SUFFIXES[files]}") for part in ("train", "test"))
    assert not set(train) & set(test) and len(set(train)) == len(train) and len(set(test)) == len(test)


def test_the_reference_pictures_are_what_the_tool_draws(tmp_path, monkeypatch):
    """To within what a JPEG library may round otherwise."""
    import numpy as np
    from PIL import Image

    monkeypatch.setattr(reference_pictures, "FOLDER", tmp_path)
    kept = sorted((PROMPTS / "pictures").glob("*.jpg"))
    assert kept
    for path in kept:
        getattr(reference_pictures, path.stem)().save(path.stem)
        one, other = (np.asarray(Image.open(p), dtype=float) for p in (path, tmp_path / path.name))
        assert np.abs(one - other).mean() < 1
