"""What a page reads of a run, and its request to stop."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from comfy_dancegrpo.runs import live, metrics
from comfy_dancegrpo.trainer.console import ConsoleHost


@pytest.fixture(scope="module")
def run(cli, quickstart, tiny_loop, tmp_path_factory):
    """The folder of a run of two iterations, two groups of three; nothing but its loop and Save LoRA."""
    graph = json.loads(quickstart.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] in ("DanceGRPOEvaluate", "SaveImage", "PreviewImage"):
            node["mode"] = 2
    path = tmp_path_factory.mktemp("live") / "flow.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    done = cli("run", path, "--output", path.parent / "out", *tiny_loop)
    assert done.status == 0, done.err
    return path.parent / "out" / "quickstart"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_curves_are_the_metrics(run):
    seen = live.read(run)
    assert (seen["name"], seen["state"], seen["iteration"], seen["iterations"]) == ("quickstart", "finished", 2, 2)
    for name in live.COLUMNS:
        assert seen["columns"][name] == [row[name] for row in rows(run)]
    assert seen["seconds_left"] is None


def test_the_last_iterations_first_group_is_shown_best_first(run):
    group = live.read(run)["group"]
    samples = group["samples"]
    assert group["reward"] == "clip_score" and len(samples) == 3
    assert sorted(p.name for p in (run / "live").glob("*.jpg")) == sorted(s["file"] for s in samples)
    assert {s["file"].split("-")[0] for s in samples} == {"2"}
    assert [s["advantage"] for s in samples] == sorted((s["advantage"] for s in samples), reverse=True)
    assert [s["score"] for s in samples] == sorted((s["score"] for s in samples), reverse=True)  # one reward: the same order
    scores = [s["score"] for s in samples]
    mean = sum(scores) / 3
    std = (sum((x - mean) ** 2 for x in scores) / 2) ** 0.5
    for sample in samples:  # the advantage's definition
        assert sample["advantage"] == pytest.approx((sample["score"] - mean) / (std + 1e-8), abs=1e-4)
        assert Image.open(run / "live" / sample["file"]).size == (64, 64)


def test_long_curves_are_thinned_and_keep_their_end(tmp_path):
    (tmp_path / "run.json").write_text('{"state": "running", "iterations": 0}')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i, "reward_mean": i / 2}) + "\n" for i in range(1, 2502)))
    seen = live.read(tmp_path)
    assert len(seen["columns"]["iteration"]) <= live.POINTS + 1
    assert seen["columns"]["iteration"][0] == 1 and seen["columns"]["iteration"][-1] == 2501 == seen["iteration"]
    assert seen["columns"]["reward_mean"][-1] == 1250.5 and seen["columns"]["grad_norm"][-1] is None


@pytest.fixture
def read_bytes(monkeypatch):
    """How many bytes of metrics.jsonl were read since it was last asked."""
    counted, opened = [0], Path.open

    class Counting(io.FileIO):
        def read(self, count=-1):
            found = super().read(count)
            counted[0] += len(found)
            return found

        def readall(self):
            pytest.fail("the whole file was asked for")

    def open_path(self, mode="r", buffering=-1, *options, **named):
        return Counting(self, "r") if (self.name, mode, buffering) == ("metrics.jsonl", "rb", 0) else opened(self, mode, buffering, *options, **named)

    monkeypatch.setattr(Path, "open", open_path)

    def since():
        found, counted[0] = counted[0], 0
        return found

    return since


def row(iteration, **more):
    return {"iteration": iteration, "reward_mean": iteration / 8, "time": 1e9 + iteration, **more}


@pytest.mark.parametrize("length", [10, 20_000])
def test_only_what_was_appended_is_read(tmp_path, read_bytes, length):
    (tmp_path / "run.json").write_text('{"state": "running", "iterations": 0}')
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(1, length + 1)))
    assert live.read(tmp_path)["iteration"] == length and read_bytes() == path.stat().st_size
    for i in range(length + 1, length + 4):
        metrics.append(path, row(i))
        assert live.read(tmp_path)["iteration"] == i
        assert 0 < read_bytes() <= 3 * len(json.dumps(row(i)))  # the line known last, and the new one
    live.read(tmp_path)
    assert read_bytes() <= 2 * len(json.dumps(row(i)))


@pytest.mark.parametrize("how", ["as a resumed run does", "in place", "grown past its former end", "another file"])
def test_a_file_that_was_cut_is_read_again(tmp_path, how):
    (tmp_path / "run.json").write_text('{"state": "running", "iterations": 0}')
    path, long = tmp_path / "metrics.jsonl", 40
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(1, long + 1)))
    assert live.read(tmp_path)["iteration"] == long
    upto = long + 30 if how == "grown past its former end" else 20
    again = [row(i) for i in range(1, 11)] + [row(i, time=2e9 + i, reward_mean=-i) for i in range(11, upto + 1)]
    if how == "as a resumed run does":
        metrics.cut_after(path, 10)
        for values in again[10:]:
            metrics.append(path, values)
    elif how == "another file":
        (tmp_path / "other").write_text("".join(json.dumps(values) + "\n" for values in again))
        (tmp_path / "other").replace(path)
    else:  # the same file
        path.write_text("".join(json.dumps(values) + "\n" for values in again))
    seen = live.read(tmp_path)
    assert seen["columns"]["iteration"] == list(range(1, upto + 1))
    assert seen["columns"]["reward_mean"] == [values["reward_mean"] for values in again]
    path.unlink()
    assert live.read(tmp_path)["iteration"] == 0


def test_an_unfinished_line_is_left_out_until_it_is_whole(tmp_path):
    (tmp_path / "run.json").write_text('{"state": "running", "iterations": 0}')
    path, line = tmp_path / "metrics.jsonl", json.dumps(row(2)) + "\n"
    path.write_text(json.dumps(row(1)) + "\n" + line[:20])
    assert live.read(tmp_path)["columns"]["iteration"] == [1]
    with path.open("a") as file:
        file.write(line[20:])
    assert live.read(tmp_path)["columns"]["iteration"] == [1, 2]


def test_what_watch_found_and_why_it_stopped_the_run(tmp_path):
    (tmp_path / "run.json").write_text('{"state": "stopped", "iterations": 10, "stopped_by": "clip_score is 0.3"}')
    assert live.read(tmp_path)["watched"] == {"iteration": [], "rewards": {}}
    evaluations = [{"iteration": 10 * k, "rewards": {"clip_score": 0.5 - k / 10, "exact": k}} for k in range(3)]
    (tmp_path / "watch.jsonl").write_text("".join(json.dumps(values) + "\n" for values in evaluations))
    seen = live.read(tmp_path)
    assert seen["watched"] == {"iteration": [0, 10, 20], "rewards": {"clip_score": [0.5, 0.4, 0.3], "exact": [0, 1, 2]}}
    assert seen["stopped_by"] == "clip_score is 0.3"
    (tmp_path / "run.json").write_text('{"state": "finished", "iterations": 10, "stopped_by": "a former run\'s"}')
    assert live.read(tmp_path)["stopped_by"] == ""


def test_what_is_no_run(tmp_path, run):
    assert live.read(tmp_path) == {} == live.read(tmp_path / "none")
    (tmp_path / "run.json").write_text("{")
    assert live.read(tmp_path) == {}
    assert live.list_runs(tmp_path / "none") == []
    assert live.list_runs(run.parent) == [{"name": "quickstart", "state": "finished", "iteration": 2}]


@pytest.fixture
def asked(monkeypatch):
    """The user asks to stop in the middle of the second iteration."""
    told = ConsoleHost.run_moved

    def run_moved(self, folder, iteration, iterations):
        told(self, folder, iteration, iterations)
        if iteration == 1:
            live.request_stop(folder)

    monkeypatch.setattr(ConsoleHost, "run_moved", run_moved)


def test_stop_after_this_iteration_goes_on_with_what_was_trained(cli, quickstart, tiny, tmp_path, asked, monkeypatch):
    words = [*tiny, "--iterations", 4]
    done = cli("run", quickstart, "--output", tmp_path / "asked", *words)
    assert done.status == 0, done.err
    folder = tmp_path / "asked/quickstart"
    assert len(rows(folder)) == 1 and live.read(folder)["state"] == "stopped" and not (folder / "live/stop").exists()
    assert (folder / "summary.json").is_file() and any("stopped after iteration 1" in line for line in done.err)
    monkeypatch.undo()
    assert cli("run", quickstart, "--output", tmp_path / "one", *tiny, "--iterations", 1).status == 0
    equal(folder, tmp_path / "one/quickstart")
    done = cli("run", quickstart, "--output", tmp_path / "asked", *words, "--set", "Loop Start.on_existing=resume")
    assert done.status == 0 and any("goes on after iteration 1" in line for line in done.err)
    assert cli("run", quickstart, "--output", tmp_path / "four", *words).status == 0
    equal(folder, tmp_path / "four/quickstart")


def test_a_former_request_stops_no_later_run(cli, quickstart, tiny, tmp_path):
    for again in ("new", "restart"):
        done = cli("run", quickstart, "--output", tmp_path, *tiny, "--set", f"Loop Start.on_existing={again}")
        assert done.status == 0 and len(rows(tmp_path / "quickstart")) == 2
        live.request_stop(tmp_path / "quickstart")


def equal(folder, other):
    ours, theirs = (load_file(path / "lora/quickstart.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_a_live_state_that_cannot_be_written_is_said_and_ends_no_run(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    def write(path, data):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(live, "write_atomically", write)
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop)
    assert done.status == 0 and len(rows(tmp_path / "quickstart")) == 2
    said = [line for line in done.err if "what pages show" in line]
    assert len(said) == 2 and "iteration 1: " in said[0] and os.strerror(errno.EIO) in said[0]


def test_pictures_that_a_page_has_open_are_deleted_later(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    """As Windows has it, which deletes no open file."""
    unlink = Path.unlink

    def refuse(self, missing_ok=False):
        if self.suffix == ".jpg" and self.name.startswith("1-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop)
    assert done.status == 0 and not any("what pages show" in line for line in done.err)
    shown = {path.name for path in (tmp_path / "quickstart/live").glob("*.jpg")}
    assert shown == {f"{iteration}-{place}.jpg" for iteration in (1, 2) for place in range(3)}
    monkeypatch.undo()
    words = ["run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--iterations", 3, "--set", "Loop Start.on_existing=resume"]
    assert cli(*words).status == 0
    assert {path.name for path in (tmp_path / "quickstart/live").glob("*.jpg")} == {f"3-{place}.jpg" for place in range(3)}


def test_reading_imports_no_torch():
    code = "import sys; import comfy_dancegrpo.runs.live; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
