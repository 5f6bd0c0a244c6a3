"""What a run says of its metrics, once; and the pages that tell what to do name inputs, choices and metrics that there are."""

import inspect
import json
import re
from pathlib import Path

import pytest

from comfy_dancegrpo import nodes
from comfy_dancegrpo.grpo import estimators
from comfy_dancegrpo.grpo.objectives import OBJECTIVES
from comfy_dancegrpo.grpo.transitions import TRANSITIONS
from comfy_dancegrpo.policies import FAMILIES
from comfy_dancegrpo.runs import advice
from comfy_dancegrpo.runs.advice import CHECKS, PAGE, Advice, see
from comfy_dancegrpo.workflow.schema import inputs_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / name for name in ("it_does_not_learn.md", "algorithms.md")]
INPUTS = {(cls.TITLE, item.name): item for cls in nodes.NODE_CLASS_MAPPINGS.values() for item in inputs_of(cls.INPUT_TYPES()).values()}


def row(iteration, **changes):
    pictures = {"sharpness": 100.0, "saturation": 0.3, "grid": 0.5, "near_duplicates": 0.0} | changes.pop("pictures", {})
    return {"iteration": iteration, "reward_mean": 0.5 + 0.01 * iteration, "flat_groups": 0, "clip_fraction": 0.1, "grad_norm": 0.2, "pictures": pictures} | changes


def lines(rows, groups=4):
    of_run = Advice(groups)
    return [line for of_row in rows for line in of_run.of(of_row)]


def noisy(iteration):
    return 0.5 + (0.1 if iteration % 2 else -0.1)


@pytest.mark.parametrize("section, count, bad, good", [
    ("groups-without-spread", 8, {"flat_groups": 2}, {"flat_groups": 1}),
    ("the-pictures-of-a-group-are-alike", 6, {"pictures": {"near_duplicates": 0.6}}, {"pictures": {"near_duplicates": 0.4}}),
    ("nothing-but-clipped-steps", 6, {"clip_fraction": 0.95}, {"clip_fraction": 0.85}),
])
def test_what_is_so_in_five_iterations_is_told_once(section, count, bad, good):
    """It is so from the fourth on: in all of five by the eighth, in their mean by the sixth."""
    assert lines([row(i, **good) for i in range(1, 100)]) == []
    (line,) = lines([row(i, **(bad if i > 3 else good)) for i in range(1, 100)])
    assert line.startswith(f"iteration {count}: ") and line.endswith(see(section)) and "\n" not in line


def test_a_jump_of_the_gradient():
    assert lines([row(i, grad_norm=0.2 if i != 30 else 1.9) for i in range(1, 60)]) == []
    (line,) = lines([row(i, grad_norm=0.2 if i != 30 else 2.4) for i in range(1, 60)])
    assert line == f"iteration 30: the gradient's norm is 2.4, 12 times that of the iterations before; {see('the-gradients-norm-jumps')}"


def test_a_reward_that_stands_still_and_one_that_rises():
    (line,) = lines([row(i, reward_mean=noisy(i)) for i in range(1, 100)])
    assert line.startswith("iteration 60: the reward has not risen: 0.5 in the first 20 iterations, 0.5 in the last; ")
    assert lines([row(i, reward_mean=noisy(i) + 0.002 * i) for i in range(1, 100)]) == []  # 0.08 in 40 iterations, where chance makes 0.03
    (line,) = lines([row(i, reward_mean=-0.002 * i) for i in range(1, 70)])
    assert see("the-reward-does-not-rise") in line


@pytest.mark.parametrize("name, factor", [("sharpness", 0.93), ("sharpness", 1.07), ("saturation", 1.04)])
def test_pictures_that_change_while_the_reward_rises(name, factor):
    start = row(1)["pictures"][name]
    changing = [row(i, pictures={name: start * factor**i}) for i in range(1, 40)]
    (line,) = lines(changing)
    assert f"the pictures' {name} went from" in line and line.endswith(see("the-reward-rises-and-the-pictures-get-worse"))
    assert lines([{**r, "reward_mean": -r["reward_mean"]} for r in changing]) == []


def test_a_grid_that_comes_out():
    (line,) = lines([row(i, pictures={"grid": 0.5 + 0.3 * i}) for i in range(1, 40)])
    assert "a grid comes out in the pictures" in line


def test_a_resumed_run_says_nothing_twice():
    rows = [row(i, flat_groups=4) for i in range(1, 30)]
    resumed = Advice(4)
    resumed.follow(rows[:20])
    assert [line for of_row in rows[20:] for line in resumed.of(of_row)] == []
    early = Advice(4)
    early.follow(rows[:3])
    assert len([line for of_row in rows[3:] for line in early.of(of_row)]) == 1


def test_a_long_run_is_not_kept():
    of_run = Advice(4)
    for i in range(1, 1000):
        of_run.of(row(i))
    assert len(of_run._rows) == 80 and [r["iteration"] for r in of_run._rows[:20]] == list(range(1, 21))


# -- the pages ------------------------------------------------------------------------------------------------------------------
def test_every_section_that_the_run_names_is_there_and_comes_first():
    titles = re.findall(r"^## (.+)$", (ROOT / PAGE).read_text(encoding="utf-8"), re.MULTILINE)
    sections = [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]
    text = (ROOT / "comfy_dancegrpo/runs/session.py").read_text(encoding="utf-8")
    named = {*CHECKS, *re.findall(r"see\('([a-z-]+)'\)", text)}
    assert named == set(sections[:8]) and len(sections) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_inputs_and_choices_that_there_are(page):
    text = page.read_text(encoding="utf-8")
    named = {tuple(name.split(".")) for name in re.findall(r"`([A-Z][A-Za-z ]+\.\w+)`", text)} - {("Block", "input")}
    assert named and named <= INPUTS.keys(), named - INPUTS.keys()
    for title, name, value in re.findall(r"`([A-Z][A-Za-z ]+)\.(\w+)` ([a-z]\w+)", text):
        assert (INPUTS.get((title, name)) is None or INPUTS[title, name].choices is None) or value in INPUTS[title, name].choices, (title, name, value)


def test_the_page_names_metrics_that_there_are_and_a_run_says_what_it_sees(tmp_path, cli, loop_only, saved, tiny_loop, monkeypatch):
    monkeypatch.setattr(advice, "CHECKS", {"groups-without-spread": lambda rows: f"{rows[-1]['groups']} groups are seen"})
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop)
    found = json.loads((tmp_path / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    known = {*found, *(f"pictures.{name}" for name in found["pictures"])}
    named = set(re.findall(r"`([a-z_]+_[a-z_.]+|pictures\.[a-z_]+)`", (ROOT / PAGE).read_text(encoding="utf-8")))
    metrics = {name for name in named if not name.endswith((".json", ".jsonl")) and name not in ("dance_sde", "flow_grpo_sde")}
    said = [line for line in done.err if "groups are seen" in line]
    assert said == [f"WARNING: iteration 1: 2 groups are seen; {see('groups-without-spread')}"]
    assert done.status == 0 and metrics <= known and {"ratio_deviation", "flat_groups", "pictures.grid"} <= metrics, metrics - known


def test_the_page_says_how_many_lines_an_algorithm_has():
    found = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "comfy_dancegrpo/grpo").rglob("*.py")}
    found |= {name: len(inspect.getsource(of).splitlines()) for name, of in inspect.getmembers(estimators, inspect.isfunction)}
    section = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8").partition("## Lines of code")[2].partition("\n## ")[0]
    told = {name: int(lines) for name, lines in re.findall(r"`(\w+)` (\d+)", section)}
    assert told.keys() >= {*TRANSITIONS, *OBJECTIVES} and told == {name: found[name] for name in told}


def test_the_page_says_how_many_lines_a_family_has():
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8").partition("\n## ")[0]
    told = {name: int(lines) for files, lines in re.findall(r"\| (`\w+\.py`(?:, `\w+\.py`)*) \| ([\d, ]+) \|", page)
            for name, lines in zip(re.findall(r"`(\w+)\.py`", files), lines.split(", "))}
    assert told.keys() == {module for module, _ in FAMILIES.values()}
    assert told == {name: len((ROOT / f"comfy_dancegrpo/policies/{name}.py").read_text(encoding="utf-8").splitlines()) for name in told}
