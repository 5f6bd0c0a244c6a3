"""Rewards of the user's own: files of folders that the settings name, and entry points; as docs/your_own_reward.md shows them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfy_dancegrpo import rewards, settings
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.nodes.rewards import LoadReward
from comfy_dancegrpo.rewards import own
from comfy_dancegrpo.workflow.host import Host, use

ROOT = Path(__file__).resolve().parent.parent
BRIGHTNESS, COLOUR = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/your_own_reward.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
ENTRY = re.search(r'^```toml\n\[project\.entry-points\."(.+)"\]\n(.*?)^```', (ROOT / "docs/your_own_reward.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
PICTURES = torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """The folder models/reward_models/custom of a host, which the settings enable."""
    folder = tmp_path / "models/reward_models/custom"
    folder.mkdir(parents=True)
    (tmp_path / "settings.json").write_text(json.dumps({"reward_folders": [str(folder)]}))
    monkeypatch.setenv(settings.PATH, str(tmp_path / "settings.json"))
    rewards._log.cache_clear()
    with use(Host(models=tmp_path / "models")):
        yield folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(entries)`: a package my_package with these entry points, and the page's reward."""
    own._entry_points.cache_clear()

    def install(entries, group=own.GROUP):
        (tmp_path / "site/my_package").mkdir(parents=True)
        (tmp_path / "site/my_package/brightness.py").write_text(BRIGHTNESS)
        info = tmp_path / "site/my_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entries}")
        monkeypatch.syspath_prepend(tmp_path / "site")
        own._entry_points.cache_clear()

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]
    own._entry_points.cache_clear()


def choices():
    return LoadReward.INPUT_TYPES()["required"]["reward"][0]


def valid(name, model="embedded"):
    return LoadReward.VALIDATE_INPUTS(name, model)


def load(name, model="embedded"):
    (reward,) = LoadReward().load(name, model, 2)
    return reward


def test_the_page_shows_one_in_ten_lines(custom):
    (custom / "brightness.py").write_text(BRIGHTNESS)
    assert len(BRIGHTNESS.splitlines()) <= 10
    assert choices() == [*rewards.REWARDS, "brightness"] and valid("brightness") is True
    found = load("brightness")
    assert found.name == "brightness"
    assert torch.allclose(found(PICTURES, PROMPTS), PICTURES.mean((1, 2, 3)), atol=1e-6, rtol=0)
    assert not list(custom.glob("*/*"))  # no bytecode beside models


def test_one_with_weights(custom):
    (custom / "colour.py").write_text(COLOUR)
    save_file({"colour": torch.tensor([0.5, 0.25, 1.0])}, custom.parent / "blue.safetensors")
    assert valid("colour", "blue.safetensors") is True
    expected = [-sum((float(p[..., c].double().mean()) - wanted) ** 2 for c, wanted in enumerate((0.5, 0.25, 1.0))) for p in PICTURES]
    found = load("colour", "blue.safetensors")
    assert torch.allclose(found(PICTURES, PROMPTS).double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert [type(module).__name__ for module in found.modules] == ["Colour"]
    assert "found 'red.safetensors', which is in none of the folders searched" in valid("colour", "red.safetensors")


def test_a_module_scores_as_it_does_after_training(custom):
    (custom / "drops.py").write_text("import torch\n\n\nclass Drops(torch.nn.Module):\n    def __init__(self, source):\n        super().__init__()\n"
                                     "        self.layer = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.9))\n\n"
                                     "    def forward(self, pictures, prompts):\n        self.scores = self.layer(pictures.mean((1, 2)))\n"
                                     "        return self.scores\n\n\nload = Drops\n")
    reward = load("drops")
    assert torch.equal(reward(PICTURES, PROMPTS), reward(PICTURES, PROMPTS)) and not reward.loaded.scores.requires_grad


def test_a_workflow_trains_on_one(custom, cli, loop_only, saved, tiny_loop, tmp_path):
    (custom / "brightness.py").write_text(BRIGHTNESS)
    loop_only["3"]["inputs"]["reward"] = "brightness"
    done = cli("run", saved(loop_only), "--output", tmp_path / "out", *tiny_loop)
    assert done.status == 0, done.err
    row = json.loads((tmp_path / "out/quickstart/metrics.jsonl").read_text().splitlines()[0])
    assert list(row["rewards"]) == ["brightness"] and 0 < row["reward_mean"] < 1


def test_check_reward_takes_it(custom, cli, tmp_path):
    (custom / "brightness.py").write_text(BRIGHTNESS)
    Image.new("RGB", (8, 8), (51, 102, 153)).save(tmp_path / "one.png")
    assert cli("check-reward", "brightness", tmp_path / "one.png", "--prompt", "").out[1].split() == ["0.4000", "one.png"]


def test_without_the_settings_a_file_is_nothing(custom, tmp_path, caplog):
    (custom / "brightness.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n" + BRIGHTNESS)
    settings.path().write_text("{}")
    assert choices() == list(rewards.REWARDS) and not caplog.records
    line = valid("brightness")
    print(line)
    assert line.startswith("input \"reward\": found 'brightness', accepted: one of 'clip_score', ") and "\n" not in line
    assert line.endswith(f'{custom / "brightness.py"} is not used, since "reward_folders" of your settings, {settings.path()}, does not name its folder')
    assert "is not used" not in valid("../custom/brightness") and "is not used" not in valid("darkness")
    with pytest.raises(RunError) as raised:  # of a name that comes over a link
        rewards.load("brightness")
    assert str(raised.value) == line
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text, said", [
    ("import no_such_module\n" + BRIGHTNESS, ", line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("\n\nx = {}['a']\n", ", line 3: KeyError: 'a'"),
    ("load = 3\n", ": found no load(source), which gives the function that scores"),
    ("def load(source\n", ", line 1: SyntaxError: "),
    ("raise ValueError('a\\nb')\n", ", line 1: ValueError: a"),
])
def test_one_that_cannot_be_imported_is_one_line_and_hides_no_other(custom, text, said):
    (custom / "brightness.py").write_text(BRIGHTNESS)
    (custom / "broken.py").write_text(text)
    assert choices()[-2:] == ["brightness", "broken"]
    with pytest.raises(RunError) as raised:
        load("broken")
    (line,) = str(raised.value).splitlines()
    print(line)
    assert line.startswith(str(custom / "broken.py") + said)
    assert (valid("broken") == line) == ("SyntaxError" in said)  # what is no Python is found without executing it
    assert load("brightness")(PICTURES, PROMPTS).shape == (3,)


def test_a_broken_one_stops_before_training(custom, cli, loop_only, saved, tiny_loop, tmp_path):
    (custom / "broken.py").write_text("import no_such_module\n")
    loop_only["3"]["inputs"]["reward"] = "broken"
    done = cli("run", saved(loop_only), "--output", tmp_path / "out", *tiny_loop)
    (line,) = done.verdict
    assert line == f'node 3 "Load Reward (CLIP, trained on)" (DanceGRPOLoadReward): {custom / "broken.py"}, line 1: ModuleNotFoundError: No module named \'no_such_module\''
    assert done.status == 3 and not (tmp_path / "out/quickstart").exists()


def test_our_names_stay_ours(custom, caplog):
    for name in ("jpeg_size", "brightness", "two words"):
        (custom / f"{name}.py").write_text(BRIGHTNESS)
    (custom / "_helper.py").write_text("")
    assert choices() == choices() == [*rewards.REWARDS, "brightness"]
    print(caplog.messages)
    assert caplog.messages == [  # once each
        f"{custom / 'jpeg_size.py'}: found the name 'jpeg_size', which a reward of this program has, and keeps; accepted: another",
        f"{custom / 'two words.py'}: found the name 'two words', accepted: letters, digits and \"_\", and \".\" and \"-\" between them"]
    assert load("jpeg_size")(PICTURES, PROMPTS).min() > 0.3
    assert valid("two words").endswith(f"; {caplog.messages[1]}")


@pytest.mark.parametrize("text, said", [
    ('{"reward_folders": "here"}', "\"reward_folders\": found 'here', accepted: a list of folders, from the root or from \"~\" on"),
    ('{"reward_folders": ["here"]}', "\"reward_folders\": found ['here'], accepted: a list of folders"),
    ('{"reward_folders": ["/no/such/folder"]}', '"reward_folders": /no/such/folder: FileNotFoundError: '),
    ("{", "are not JSON"),
])
def test_settings_that_are_wrong_leave_the_rest(custom, caplog, text, said):
    settings.path().write_text(text)
    assert choices() == list(rewards.REWARDS)
    (line,) = caplog.messages
    assert said in line and str(settings.path()) in line and valid("brightness").endswith(line)


def test_folders_begin_at_home_too(custom, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    settings.path().write_text('{"reward_folders": ["~/models/reward_models/custom"]}')
    (custom / "brightness.py").write_text(BRIGHTNESS)
    assert choices()[-1] == "brightness"


def test_a_package_offers_one(custom, installed):
    assert ENTRY[1] == own.GROUP
    installed(ENTRY[2].replace('"', '') + "missing = my_package.missing\njpeg_size = my_package.brightness\n")
    assert choices() == [*rewards.REWARDS, "brightness", "missing"] and "my_package" not in sys.modules
    assert torch.allclose(load("brightness")(PICTURES, PROMPTS), PICTURES.mean((1, 2, 3)), atol=1e-6, rtol=0)
    with pytest.raises(RunError, match=r"^my_package\.missing of my-package: ModuleNotFoundError: No module named 'my_package.missing'$"):
        load("missing")


def test_a_file_comes_before_a_package(custom, installed, caplog):
    installed(ENTRY[2].replace('"', ''))
    (custom / "brightness.py").write_text(BRIGHTNESS.replace(".mean()", ".sum()"))
    assert torch.allclose(load("brightness")(PICTURES, PROMPTS), PICTURES.sum((1, 2, 3)))
    assert caplog.messages == [f"my_package.brightness of my-package: found the name 'brightness', which {custom / 'brightness.py'} has, and keeps; accepted: another"]


def test_what_the_user_changes_counts(custom):
    (custom / "brightness.py").write_text(BRIGHTNESS)
    before, state = load("brightness"), LoadReward.IS_CHANGED(reward="brightness", model="embedded")
    assert LoadReward.IS_CHANGED(reward="brightness", model="embedded") == state
    (custom / "brightness.py").write_text(BRIGHTNESS.replace("mean", "amax"))  # of the same length, in the same second
    os.utime(custom / "brightness.py", ns=(0, 1))
    assert LoadReward.IS_CHANGED(reward="brightness", model="embedded") != state
    assert torch.equal(load("brightness")(PICTURES, PROMPTS), PICTURES.amax((1, 2, 3)))
    assert torch.allclose(before(PICTURES, PROMPTS), PICTURES.mean((1, 2, 3)))
    assert LoadReward.IS_CHANGED(reward="clip_score") == LoadReward.IS_CHANGED(reward=None) == ""


def test_whole_videos(custom):
    (custom / "frames.py").write_text("def load(source):\n    def frames(videos, prompts):\n        return [len(video) for video in videos]\n\n"
                                      "    frames.whole_videos = True\n    return frames\n")
    assert load("frames")([torch.zeros(5, 4, 4, 3), torch.zeros(7, 4, 4, 3)], PROMPTS[:2]).tolist() == [5, 7]
    assert load("frames")(PICTURES, PROMPTS).tolist() == [1, 1, 1]


def test_comfyui_lists_them_and_imports_none(custom, tmp_path):
    """As ComfyUI loads the pack, and answers with the choices."""
    (custom / "brightness.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n" + BRIGHTNESS)
    code = ("import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r})\n"
            "pack = importlib.util.module_from_spec(spec); spec.loader.exec_module(pack)\n"
            "choices = pack.NODE_CLASS_MAPPINGS['DanceGRPOLoadReward'].INPUT_TYPES()['required']['reward'][0]\n"
            "print(choices[-1], 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["brightness", "False"] and not (tmp_path / "executed").exists()
