"""`dancegrpo runs` and `dancegrpo compare`: what they tell of runs' files, and that they import nothing heavy."""

import json
import subprocess
import sys

import pytest

from comfy_dancegrpo.runs import lock
from comfy_dancegrpo.trainer import comparing


def made(folder, rewards, state="finished", seconds=2.0, **changed):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"state": state, "iterations": len(rewards)}))
    rows = [{"iteration": i, "reward_mean": r, "reward_std": 0.1, "rewards": {"clip_score": {"mean": r, "weight": 1.0}},
             "seconds": {"denoise": seconds / 2, "total": seconds}, "time": 1e9 + i} for i, r in enumerate(rewards, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = {"4": {"class_type": "DanceGRPOLoopStart", "inputs": {"policy": ["1", 0], "learning_rate": 0.1, "run_name": folder.name}, "_meta": {"title": "Loop Start"}},
              "10": {"class_type": "DanceGRPOLoadReward", "inputs": {"reward": "hps_v2", "model": "b"}},
              "3": {"class_type": "DanceGRPOLoadReward", "inputs": {"reward": "clip_score", "model": "a"}}}
    for name, value in changed.items():
        prompt["4"]["inputs"][name] = value
    (folder / "prompt.json").write_text(json.dumps(prompt))
    return folder


def cells(lines):
    """What stands in a table's rows."""
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if "│" in line or "┃" in line]


def test_runs_are_listed_with_their_state_and_reward(cli, tmp_path):
    made(tmp_path / "done", [0.1 * i for i in range(1, 9)])  # windows of two: 0.15 first, 0.75 last
    made(tmp_path / "killed", [0.5], state="running")
    held = made(tmp_path / "going", [0.9, 0.3, 0.4], state="running")
    made(tmp_path / "broken", [0.5])
    (tmp_path / "broken" / "metrics.jsonl").write_text("{half\n")
    (tmp_path / "other").mkdir()
    lock_of = lock.take(held)
    try:
        done = cli("runs", "--output", tmp_path)
    finally:
        lock_of.release()
    assert done.status == 0
    rows = {line.split()[0]: line.split()[1:] for line in done.out[1:] if line and line.split()[0] in ("done", "killed", "going", "broken", "other")}
    assert rows["done"][:7] == ["finished", "8/8", "0.1500", "→", "0.7500", "0.7500", "(8)"] and rows["done"][7] == "2.00"
    assert rows["killed"][:2] == ["interrupted", "1/1"] and rows["going"][:7] == ["running", "3/3", "0.9000", "→", "0.4000", "0.9000", "(1)"]
    assert rows["broken"] == ["damaged"] and "other" not in rows


def test_no_runs_and_no_folder_are_said(cli, tmp_path):
    assert cli("runs", "--output", tmp_path).out == [f"no runs in {tmp_path}"]
    done = cli("runs", "--output", tmp_path / "no")
    assert done.status == 2 and "--output" in done.verdict[0]


def test_names_do_not_steer_the_terminal(cli, tmp_path):
    made(tmp_path / "\x1b]0;evil\x07[bold]a", [0.5])
    text = "\n".join(cli("runs", "--output", tmp_path).out)
    assert "\x1b" not in text and "\x07" not in text and "[bold]a" in text


def test_two_runs_are_compared(cli, tmp_path):
    a, b = made(tmp_path / "a", [0.1, 0.2]), made(tmp_path / "b", [0.3, 0.5, 0.4], seconds=4.0, learning_rate=0.2, warmup=7)
    (b / "summary.json").write_text(json.dumps({"evaluations": {"clip_score": {"gain": 0.25, "ci95": [0.1, 0.4], "n": 12}}}))
    (a / "watch.jsonl").write_text("".join(json.dumps({"iteration": i, "rewards": {"hps_v2": v}}) + "\n" for i, v in ((0, 0.5), (2, 0.25))))
    for folder, version in ((a, "1.0"), (b, "2.0")):
        (folder / "environment.json").write_text(json.dumps([{"from_iteration": 0, "time": 1.0, "python": "3.11", "packages": {"torch": version}}]))
    done = cli("compare", "a", b, "--output", tmp_path)
    assert done.status == 0
    rows = {row[0]: row[1:] for row in cells(done.out)}
    assert rows["reward, first → last"] == ["0.1000 → 0.2000", "0.3000 → 0.4000"] and rows["best reward (iteration)"] == ["0.2000 (2)", "0.5000 (2)"]
    assert rows["evaluated clip_score, gain (95 %)"] == ["", "+0.2500 (+0.1000 to +0.4000), 12 prompts"]
    assert rows["watched hps_v2, start → last"] == ["0.5000 → 0.2500", ""]
    assert rows["s/iteration"] == ["2.000", "4.000"] and rows["denoise"] == ["1.000", "2.000"]
    assert list(comparing.settings(a, b)) == [("Loop Start: learning_rate", "0.1", "0.2"), ("Loop Start: warmup", "–", "7")]
    assert rows["torch"] == ["1.0", "2.0"] and "python" not in rows
    assert cli("compare", "a", "c", "--output", tmp_path).status == 2


def test_nodes_that_one_has_and_pairs_of_one_class(tmp_path):
    a, b = made(tmp_path / "a", [0.1]), made(tmp_path / "b", [0.1])
    prompt = json.loads((b / "prompt.json").read_text())
    del prompt["4"]
    prompt["11"] = prompt.pop("10")  # the second of its class still, under another id
    prompt["11"]["inputs"]["model"] = "c"
    (b / "prompt.json").write_text(json.dumps(prompt))
    assert sorted(comparing.settings(a, b)) == [("DanceGRPOLoadReward: model", "b", "c"), ("Loop Start", "there", "–")]


@pytest.mark.parametrize("words", [["runs"], ["compare", "a", "a"]])
def test_nothing_heavy_is_imported(words, tmp_path):
    made(tmp_path / "a", [0.1])
    program = ("import sys\nfrom comfy_dancegrpo.trainer.commands import app\ntry: app()\nexcept SystemExit as end: assert not end.code\n"
               "assert not {'torch', 'diffusers', 'matplotlib', 'numpy'} & set(sys.modules), set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, *words, "--output", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
