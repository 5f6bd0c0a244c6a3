"""The benchmark of an iteration: its closed formulas, its plain reference, and each real family in small."""

import importlib
import json
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from comfy_dancegrpo.grpo.forward import timetable
from comfy_dancegrpo.grpo.noise_steps import NoiseSteps

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--prompts-per-iteration", "2", "--group-size", "3", "--steps", "4", "--micro-batch", "4", "--size", "32x32", "--repeats", "1"]


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The repository's `benchmarks`, which are not installed."""
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.iteration")
    finally:
        sys.path.remove(str(ROOT))


def benchmarks(name):
    return importlib.import_module(f"benchmarks.{name}")


# -- formulas -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [[5] * 7, [3, 1, 4, 1, 5, 9, 2, 6], [], [2]], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_calls_are_those_of_the_timetable(lengths, size):
    formulas = benchmarks("formulas")
    assert formulas.rounds(lengths, size) == len(timetable([range(length) for length in lengths], size))


def test_published_flux():
    """The issue's numbers: 192 and 108 as published."""
    formulas = benchmarks("formulas")
    rollout, replay = formulas.reference(1, 12, 16, 0.6)
    assert (rollout.calls, replay.calls) == (192, 108)
    assert formulas.rollout([1], 12, 16, 12).samples - formulas.rollout([1], 12, 16, 12).padding == 1 + 12 * 15
    assert formulas.expected("all", 12, 16) == pytest.approx((181, 12 * 9 - 12 * 0.6 + 1 - 0.4**12))
    assert formulas.expected("branch", 12, 16) == (8 + 12 * 8, 1)
    assert formulas.expected("all", 12, 16, shared=False) == (192, 108)


def test_formulas_alone(_importable, capsys):
    """What docs/speed.md has of FLUX.1."""
    assert _importable.main(["--formula", "--policy", "flux"]) == 0
    rows = {line[:28].strip(): line[28:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["as published"] == ["192.0", "108.0", "516.0", "100.0%"] and rows["branch, shared noise"][:2] == ["104.0", "1.0"]
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for row in rows.values():
        forward, backward, both, share = (f"{float(cell.rstrip('%')):g}" for cell in row)
        assert f"| {forward} | {backward} | {both} | {share} % |" in page, row


@pytest.mark.parametrize("mode, shared", [("all", True), ("all", False), ("window", True), ("branch", True)])
def test_expected_inputs_are_the_average_over_what_is_drawn(mode, shared):
    formulas, group, steps, share = benchmarks("formulas"), 4, 9, 0.75
    noise = NoiseSteps(mode, 3, 0, share)
    source, rollout, replay = torch.Generator().manual_seed(0), [], []
    for iteration in range(400):
        (noisy,) = noise.of(1, steps, 0, iteration)
        common = int(noisy.int().argmax()) + 1 if shared else 0
        trainable = noisy[:-1].nonzero()[:, 0]
        count = max(1, round(0.6 * len(trainable)))
        pairs = [(n, int(t)) for n in range(group) for t in trainable[torch.randperm(len(trainable), generator=source)[:count]]]
        of_both = formulas.rollout([common], group, steps, 1), formulas.replay([pairs], [common], group, 1)
        rollout.append(of_both[0].samples), replay.append(of_both[1].samples)
    wanted = formulas.expected(mode, group, steps, shared, 0.6, 3, share)
    assert mean(rollout) == pytest.approx(wanted[0], rel=0.03) and mean(replay) == pytest.approx(wanted[1], rel=0.03)


def test_padding_is_counted():
    formulas = benchmarks("formulas")
    found = formulas.rollout([1] * 8, 4, 6, 32)  # the quickstart: a call of 8 in 32, then 5 full ones
    assert (found.calls, found.samples, found.padding) == (6, 192, 24)
    assert formulas.replay([[(0, 0), (1, 0), (1, 1)], [(0, 1)]], [1, 1], 4, 2).padding == 1


# -- the comparison -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["all", "window", "branch"])
def test_counts_are_the_formulas_and_the_gradient_is_the_references(_importable, mode, tmp_path, capsys, one_thread):
    path = tmp_path / "found.json"
    assert _importable.main([*TINY, "--mode", mode, "--optimizer-steps", "2", "--against", "reference", "--json", str(path)]) == 0
    found, table = json.loads(path.read_text()), capsys.readouterr().out
    for side in ("ours", "reference"):
        assert found[side]["calls"] == found[side]["formula"] and found[side]["as_the_formula_says"]
        seconds = found[side]["seconds"]
        assert sum(value for phase, value in seconds.items() if phase != "total") == pytest.approx(seconds["total"], rel=0.01)
        assert 0 < found[side]["cpu_seconds"] <= seconds["total"] * 1.05  # on one thread
        assert 0.2 < found[side]["share_in_denoiser"] < 1 and found[side]["samples_per_second"] == pytest.approx(6 / seconds["total"])
    assert found["reference"]["calls"]["rollout"]["calls"] == 2 * 3 * 4 and found["reference"]["calls"]["replay"]["calls"] == 2 * 3 * 3
    assert found["ours"]["calls"]["rollout"]["calls"] < 2 * 3 * 4 / 2
    assert 0 < found["gradient"]["relative_difference"] < 1e-5 and found["gradient"]["ratio_deviation"] == 0.0
    assert "share in the denoiser" in table and "FAULT" not in table


def test_a_fault_is_told(_importable):
    calls = {"rollout": {"calls": 1, "samples": 1}, "replay": {"calls": 1, "samples": 1}}
    side, setting = {"as_the_formula_says": False, "calls": calls}, {"policy": "embedded"}
    assert len(_importable.faults({"ours": side, "setting": setting, "dtype": "float32", "gradient": {"relative_difference": 2e-5}})) == 2
    assert _importable.faults({"ours": side | {"as_the_formula_says": True}, "setting": setting, "dtype": "bfloat16", "gradient": {"relative_difference": 2e-2}}) == []


@pytest.mark.parametrize("policy, size", [("flux", "32x48"), ("sd15", "32x32"), ("hunyuan-video", "32x32x5")])
def test_real_families_in_small(_importable, policy, size, one_thread):
    words = ["--policy", policy, "--depth", "1", "--heads", "1", "--tokens", "4", "--size", size, "--prompts-per-iteration", "1", "--group-size", "2",
             "--steps", "3", "--micro-batch", "2", "--lora-rank", "2", "--best-of", "0", "--repeats", "1"]
    found = _importable.measure(_importable.parser().parse_args(words))
    assert _importable.faults(found) == [] and found["gradient"]["transitions"] > 0
    sides = 2 if policy == "sd15" else 1  # guided by a second call
    assert found["reference"]["calls"]["rollout"]["calls"] == 2 * 3 * sides


@pytest.mark.parametrize("policy, wanted", [("flux", (12, 16, 720, 1, 0.6)), ("sd15", (16, 50, 512, 1, 1.0)), ("hunyuan-video", (24, 16, 480, 53, 0.6))])
def test_defaults_are_the_published_settings(policy, wanted):
    found = benchmarks("settings").published(policy)
    assert (found.group_size, found.steps, found.width, found.frames, found.train_fraction) == wanted


# -- growth, learning -----------------------------------------------------------------------------------------------------
def test_exponent():
    assert benchmarks("sweep").exponent([1, 2, 4, 8], [3 * x**1.3 for x in (1, 2, 4, 8)]) == pytest.approx(1.3)


def test_sweep(_importable, one_thread):
    options = _importable.parser().parse_args(["--sweep", "--repeats", "1", "--steps", "3", "--group-size", "4", "--size", "32x32"])
    found, text, _ = benchmarks("sweep").run(options, {"prompts_per_iteration": (1, 4)})
    grown = found["sweeps"]["prompts_per_iteration"]
    assert all(0 < inside < whole for inside, whole in zip(grown["denoiser_seconds"], grown["seconds"])) and len(text) == 4


def test_learning_compares_the_modes(_importable, tmp_path, capsys):
    learning = benchmarks("learning")

    def run(mode, seed, calls, rewards):
        points = [{"iteration": k, "calls": k * calls, "seconds": k * calls / 10, "reward": value, "exact": 0.5} for k, value in enumerate(rewards)]
        return {"mode": mode, "seed": seed, "points": points}

    runs = [run("all", 0, 100, [0.0, 0.2, 0.4]), run("all", 1, 100, [0.0, 0.2, 0.6]), run("branch", 0, 20, [0.0, 0.25, 0.75]), run("branch", 1, 20, [0.0, 0.1, 0.4])]
    found = learning.compare(runs)
    assert found["target"] == pytest.approx(0.5) and found["calls"] == 200
    assert found["modes"]["branch"]["calls"] == [pytest.approx(30 / 200), None] and found["modes"]["branch"]["of_mean"]["calls"] == pytest.approx(
        (20 + 20 * (0.5 - 0.175) / (0.575 - 0.175)) / 200)
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, part in zip(parts, (runs[:2], runs[2:])):
        path.write_text(json.dumps({"machine": {}, "runs": part}))
    assert _importable.main(["--learning", "--from", *map(str, parts), "--plot", str(tmp_path / "plot.png")]) == 0
    assert "0.150, not reached" in capsys.readouterr().out and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_learning_measures_on_the_validation_captions(_importable, monkeypatch):
    learning, read = benchmarks("learning"), benchmarks("learning").captions
    for split in ("train", "validation"):
        assert read(split) == (ROOT / f"comfy_dancegrpo/embedded/prompts/shapes_{split}.txt").read_text(encoding="utf-8").splitlines()
    asked = []
    monkeypatch.setattr(learning, "captions", lambda split: asked.append(split) or read(split)[:4])  # all of them take long to draw
    setting = _importable.setting_of(_importable.parser().parse_args(TINY), "branch")
    points = list(learning.train(setting, 0, 1, 1, "cpu"))
    assert sorted(asked) == ["train", "validation"] and [p["iteration"] for p in points] == [0, 1]
    assert points[0]["calls"] == 0 < points[1]["calls"] and points[1]["seconds"] > 0 and -1 <= points[1]["reward"] <= 1
