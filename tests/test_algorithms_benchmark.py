"""The comparison of the algorithms: a tiny one from end to end, one that was interrupted, and the table of given numbers."""

import importlib
import json
import subprocess
import sys
from math import sqrt
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--prompts-per-iteration", "2", "--group-size", "3", "--steps", "4", "--micro-batch", "4", "--size", "32x32", "--warmup", "1", "--optimizer-steps", "2",
        "--captions", "4", "--noises", "1", "--search-prompts", "3", "--seeds", "0", "--sizes", "2"]


@pytest.fixture(scope="module", autouse=True)
def algorithms():
    """Of the repository's `benchmarks`, which are not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.algorithms")


def test_importing_it_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import benchmarks.algorithms, sys; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)


def test_every_algorithm_gives_settings_of_its_policies(algorithms):
    jobs = algorithms.reported(algorithms.parser().parse_args(["--rates", "1e-3", "--seeds", "0", "--sizes", "8"]), [])
    flow = {job.algorithm: job.setting for job in jobs if job.setting.policy == "embedded"}
    assert set(flow) == set(algorithms.ALGORITHMS) and len(jobs) > len(flow)
    assert (flow["DanceGRPO"].transition, flow["DanceGRPO"].estimator, flow["DanceGRPO"].objective) == ("dance_sde", "group", "clipped")
    assert (flow["DDPO"].estimator, flow["DPOK"].estimator, flow["DPOK"].objective) == ("per-prompt history", "learned value", "reinforce")
    assert flow["DPOK"].kl_weight > 0 == flow["DDPO"].kl_weight
    assert {job.setting.transition for job in jobs if job.setting.policy == "embedded_diffusion"} == {"ddim"}
    assert len({(job.setting.group_size, job.setting.steps, job.calls, job.setting.learning_rate) for job in jobs if job.setting.policy == "embedded"}) == 1


def test_all_weights_may_be_trained_in_place_of_a_lora(algorithms):
    words = ["--rates", "2e-4", "--seeds", "0", "--sizes", "2", "--policies", "embedded_diffusion", "--lora-targets", "all weights (no LoRA)", *TINY]
    (job,) = algorithms.reported(algorithms.parser().parse_args([*words, "--algorithms", "DPOK", "--calls", "1"]), [])
    assert type(job.setting.lora).__name__ == "FullSettings"
    assert (found := algorithms.train(job))["iterations"] == 1 and found["reward"]["gain"] != 0


def test_every_algorithm_trains(algorithms):
    """An iteration of each, on the last policy that it is for."""
    for name, algorithm in algorithms.ALGORITHMS.items():
        words = ["--algorithms", name, "--policies", algorithm.policies[-1], *TINY, "--rates", "1e-2", "--calls", "1"]
        (job,) = algorithms.reported(algorithms.parser().parse_args(words), [])
        found = algorithms.train(job)
        assert (found["iterations"], found["broke"]) == (1, "") and found["calls"] > 1 and found["reward"]["gain"] != 0, name


def test_from_end_to_end_and_on_from_where_it_was_interrupted(algorithms, tmp_path, capsys, one_thread):
    paths = {kind: tmp_path / f"found.{kind}" for kind in ("json", "table", "plot")}
    words = [*TINY, "--algorithms", "DanceGRPO", "DDPO", "--policies", "embedded", "--rates", "1e-3", "1e-2", "--calls", "150",
             *(word for kind, path in paths.items() for word in (f"--{kind}", str(path)))]
    assert algorithms.main([*words]) == 0
    whole = json.loads(paths["json"].read_text())["runs"]
    assert [run["job"]["search"] for run in whole] == [True] * 4 + [False] * 2
    for name, (slow, fast), run in zip(("DanceGRPO", "DDPO"), (whole[:2], whole[2:4]), whole[4:]):
        better = max(slow, fast, key=lambda found: found["reward"]["gain"])
        assert run["job"]["algorithm"] == better["job"]["algorithm"] == name
        assert run["job"]["setting"]["learning_rate"] == better["job"]["setting"]["learning_rate"]
        assert (run["job"]["prompts"], run["job"]["seed"], better["job"]["prompts"], better["job"]["seed"]) == (2, 0, 3, 1000)
    for run in whole:
        assert run["iterations"] > 1 and abs(run["calls"] - 150) <= run["calls"] / run["iterations"] / 2 and not run["broke"]
        assert run["reward"]["before"] == whole[0]["reward"]["before"] and run["reward"]["gain"] != 0
    assert whole[4]["reward"]["gain"] != whole[5]["reward"]["gain"]
    assert paths["plot"].read_bytes().startswith(b"\x89PNG") and paths["table"].read_text().count("\n") == 4
    assert paths["table"].read_text() in capsys.readouterr().out

    known = json.loads(paths["json"].read_text())
    other = whole[5] | {"job": whole[5]["job"] | {"calls": 151}}  # not what is asked for
    known["runs"] = [other, *(run | {"seconds": -1.0} for run in whole[:5])]  # those that it keeps are known by their seconds
    paths["json"].write_text(json.dumps(known))
    assert algorithms.main([*words, "--workers", "2"]) == 0  # in a process of its own, to the same numbers
    again = json.loads(paths["json"].read_text())["runs"]
    assert again[:6] == known["runs"] and len(again) == 7 and again[6]["seconds"] > 0
    assert again[6] | {"seconds": 0} == whole[5] | {"seconds": 0}


def test_a_run_whose_pictures_are_no_numbers_has_collapsed_and_is_not_chosen(algorithms):
    words = [*TINY, "--algorithms", "DanceGRPO", "--policies", "embedded", "--calls", "500"]
    (wild, *_), (tame, *_) = (algorithms.search(algorithms.parser().parse_args([*words, "--rates", rate, "1"])) for rate in ("1e30", "1e-3"))
    broken, whole = algorithms.train(wild), algorithms.train(tame)
    assert broken["broke"] and algorithms.collapsed(broken) and broken["iterations"] < whole["iterations"] and not whole["broke"]
    assert algorithms.best_rate([broken, whole]) == 1e-3 and algorithms.best_rate([broken]) == 1e30
    assert "nan" in algorithms.line(broken) and "nan" in algorithms.table([broken | {"job": broken["job"] | {"search": False}}])[2]


def test_gains_are_paired_by_caption(algorithms):
    found = algorithms.told([0.0, 1.0, 2.0, 3.0], [0.1, 1.1, 2.3, 3.3])
    assert (found["before"], found["after"]) == (1.5, pytest.approx(1.7))
    assert found["gain"] == pytest.approx(0.2) and found["error"] == pytest.approx(sqrt(4 * 0.01 / 3) / sqrt(4))


def test_the_table_tells_spread_worst_seed_and_collapses(algorithms, tmp_path):
    def run(name, seed, gain, exact, broke="", search=False, prompts=8):
        return {"job": {"algorithm": name, "setting": {"policy": "embedded", "learning_rate": 0.004}, "prompts": prompts, "seed": seed, "search": search},
                "broke": broke, "reward": {"gain": gain, "error": 0.01}, "exact": {"gain": exact, "error": 0.02}}

    made = [run("DDPO", 0, -0.03, 0.01), run("DDPO", 1, -0.015, -0.05), run("DDPO", 2, float("nan"), 0.0), run("DDPO", 0, 0.5, 0.5, prompts=64, broke="NaN"),
            run("DanceGRPO", 0, 0.03, 0.02), run("DanceGRPO", 1, 0.05, 0.04), run("DanceGRPO", 9, 9.0, 9.0, search=True)]
    assert [algorithms.collapsed(found) for found in made[:5]] == [True, False, True, True, False]
    dance, ddpo, broken = algorithms.table([found for found in made if found["reward"]["gain"] == found["reward"]["gain"]])[2:]
    assert dance == "| embedded | DanceGRPO | 8 | 0.004 | 2 | +0.0400 | 0.0141 | +0.0300 | +0.0300 | 0 | 0 |"
    assert ddpo == "| embedded | DDPO | 8 | 0.004 | 2 | -0.0225 | 0.0106 | -0.0300 | -0.0200 | 1 | 1 |"
    assert broken == "| embedded | DDPO | 64 | 0.004 | 1 | +0.5000 | - | +0.5000 | +0.5000 | 1 | 1 |"
    assert algorithms.best_rate(made) == 0.004 and algorithms.best_rate(made[:4]) is None


def test_a_seed_is_not_both_searched_and_reported(algorithms, capsys):
    with pytest.raises(SystemExit):
        algorithms.main(["--search-seed", "1", "--seeds", "1"])
    assert "--search-seed: found 1" in capsys.readouterr().err
