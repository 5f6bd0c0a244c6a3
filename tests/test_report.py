"""The report of a run: what is in it, that nothing in a run's text becomes HTML, and that it never costs a run anything."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.runs import environment, history, overview, report
from comfy_dancegrpo.runs.folder import RunFolder
from comfy_dancegrpo.runs.report.sections import number

EVIL = '<script>alert(1)</script><img src="http://evil.example/x" onerror="x()"> $\\frac{'


class Parsed(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attributes]

    def handle_data(self, data):
        self.text.append(data)


def opened(path):
    """The page's parts; fails for anything that would run, or be fetched."""
    text = path.read_text(encoding="utf-8")
    page = Parsed(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/jpeg;base64,", "#")), (tag, value)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "@import" not in style and "url(" not in style and "default-src 'none'" in text
    return page


def jpegs(page):
    return [base64.b64decode(v.split(",")[1]) for tag, name, v in page.attributes if (tag, name) == ("img", "src")]


@pytest.fixture(scope="module")
def run(cli, quickstart, tiny, tmp_path_factory):
    """The folder of a whole tiny quickstart, with its evaluation; and how the program ended."""
    out = tmp_path_factory.mktemp("report")
    done = cli("run", quickstart, "--output", out, *tiny)
    assert done.status == 0, done.err
    return out / "quickstart"


def test_a_run_leaves_its_report_with_all_that_it_did(run):
    page = opened(run / "report.html")
    said = "".join(page.text)
    for heading in ("Reward", "Evaluation", "Before and after", "Groups over time", "Training", "Time", "Settings", "Environment", "Checkpoints"):
        assert heading in page.text, heading
    told = json.loads((run / "summary.json").read_text())["evaluations"]["clip_score"]
    low, high = told["ci95"]
    assert number(told["gain"], sign=True) in page.text and f"{number(low, sign=True)} to {number(high, sign=True)}" in page.text
    assert "2 of 2" in said and "finished" in said and "Load Policy" in said
    import torch
    assert torch.__version__ in said
    pictures = jpegs(page)
    assert len(pictures) == 2 * 3 + 4 * 2  # two iterations' first groups of three; four held-out prompts before and after
    assert all(Image.open(io.BytesIO(data)).size == (64, 64) for data in pictures)
    assert page.tags.count("svg") >= 8 and "Watched, never trained on" not in page.text


def test_the_command_makes_it_anew_and_imports_nothing_heavy(run, tmp_path):
    words = [sys.executable, "-c", "import sys; sys.argv[0] = 'dancegrpo'\nfrom comfy_dancegrpo.trainer.commands import app\n"
             "try: app()\nexcept SystemExit as end: assert not end.code, end.code\nassert not {'torch', 'diffusers'} & set(sys.modules)"]
    done = subprocess.run([*words, "report", "quickstart", "--output", str(run.parent), "--to", str(tmp_path / "a.html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "a.html")
    without_time = lambda path: re.sub(r"made [-0-9: ]+by", "", path.read_text(encoding="utf-8"))  # noqa: E731
    assert without_time(tmp_path / "a.html") == without_time(run / "report.html")


def test_no_run_is_one_line(cli, tmp_path):
    done = cli("report", "nothing", "--output", tmp_path)
    assert done.status == 2 and len(done.verdict) == 1 and "'nothing'" in done.verdict[0]
    with pytest.raises(WorkflowError, match="no run"):
        report.write(tmp_path)


def made(folder, iterations=40, **record):
    """A run's files, all of whose text wants to be HTML."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"state": "stopped", "iterations": iterations, **record}))
    rows = [{"iteration": i, "reward_mean": i / 10, "reward_std": 0.1, "group_std": float("nan") if i == 3 else 0.1, "grad_norm": float("inf") if i == 4 else 1.0,
             "rewards": {EVIL: {"mean": 1.0, "weight": 1.0}, "b": {"mean": 2.0, "weight": 0.5}}, "seconds": {EVIL: 1.0, "total": 2.0}, "time": 1.0}
            for i in range(1, iterations + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "watch.jsonl").write_text(json.dumps({"iteration": 0, "rewards": {EVIL: 0.5}, "seconds": 1.0}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"evaluations": {EVIL: {"before": 0.1, "after": 0.2, "gain": 0.1, "ci95": None, "t": None, "n": 1}}}))
    (folder / "prompt.json").write_text(json.dumps({"1": {"class_type": EVIL, "inputs": {EVIL: EVIL, "link": ["2", 0]}, "_meta": {"title": EVIL}}}))
    (folder / "environment.json").write_text(json.dumps([{"from_iteration": 0, "time": 1.0, "python": EVIL, "packages": {EVIL: EVIL}}]))
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for name in ("0000001-0", "0000090-0", "evaluate-1-0", "evaluate-1-1"):
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.jpg")
    for i in (1, 90):
        (pictures / f"{i:07d}.json").write_text(json.dumps({"iteration": i, "prompt": EVIL, "scores": [0.5]}))
    (pictures / "evaluate-1.json").write_text(json.dumps({"reward": EVIL, "prompts": [EVIL], "before": [0.1], "after": [0.2]}))
    return folder


def test_text_of_a_run_stays_text(tmp_path):
    folder = made(tmp_path / "run", stopped_by=EVIL)
    page = opened(report.write(folder))
    assert "".join(page.text).count(EVIL) >= 14  # shown in all of these places, as it is
    assert page.tags.count("img") == 3  # and of iteration 90, which the run has not come to, nothing is


def test_what_is_damaged_or_missing_is_left_out_and_links_lead_nowhere(tmp_path):
    folder = made(tmp_path / "run")
    (tmp_path / "secret").write_text("a secret")
    (folder / "pictures" / "0000001-0.jpg").unlink()
    (folder / "pictures" / "0000001-0.jpg").symlink_to(tmp_path / "secret")
    for name in ("summary.json", "prompt.json", "environment.json", "pictures/evaluate-1.json"):
        (folder / name).write_text("{half")
    page = opened(report.write(folder))
    assert jpegs(page) == [] and "Settings" not in page.text and "Environment" not in page.text and "Training" in page.text
    (folder / "metrics.jsonl").write_text("{half\n")
    with pytest.raises(WorkflowError, match="metrics are damaged"):
        report.write(folder)


def test_faults_of_the_training_are_shown_where_there_were_any(tmp_path):
    folder = made(tmp_path / "run", 3)
    shown = lambda: [word for word in ("skipped", "without spread") if any(word in part for part in opened(report.write(folder)).text)]  # noqa: E731
    assert shown() == []
    rows = [json.loads(line) | {"skipped_steps": 0, "flat_groups": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert shown() == []
    rows[1]["skipped_steps"] = 1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert shown() == ["skipped"]


def test_a_run_that_has_done_nothing_yet_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text('{"state": "running", "iterations": 0}')
    said = "".join(opened(report.write(tmp_path)).text)
    assert "interrupted" in said and "No iteration has been done yet" in said


def test_a_report_that_fails_is_one_line_and_the_run_ends_well(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    from comfy_dancegrpo.runs.report import page

    monkeypatch.setattr(page, "build", lambda path: 1 / 0)
    done = cli("run", saved(loop_only), "--output", tmp_path / "out", *tiny_loop)
    assert done.status == 0
    assert len([line for line in done.err if line.startswith("the report ") and "ZeroDivisionError" in line]) == 1
    assert not (tmp_path / "out/quickstart/report.html").exists()


def test_numbers_are_short_and_keep_their_size():
    assert [number(v) for v in (0.12345, -0.5, 0, 1e-7, 123456.0, float("nan"), None, True)] == ["0.1235", "-0.5000", "0.0000", "1e-07", "1.23e+05", "–", "–", "–"]
    assert number(0.00004, sign=True) == "+4e-05"


@pytest.mark.parametrize("iterations", [1, 5, 16, 17, 40, 1000])
def test_points_are_few_evenly_apart_and_have_the_first(iterations):
    kept = []
    for i in range(1, iterations + 1):  # what `keep` does, without pictures
        step = history.stride(i)
        if (i - 1) % step == 0:
            kept = [k for k in [*kept, i] if (k - 1) % step == 0]
    assert kept[0] == 1 and len(kept) <= history.POINTS and len(kept) >= min(iterations, history.POINTS // 2)
    assert len({b - a for a, b in zip(kept, kept[1:])}) <= 1
    assert iterations - kept[-1] < history.stride(iterations)


def test_pictures_on_disk_are_bounded_and_a_full_disk_is_one_line(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "POINTS", 2)
    done = cli("run", saved(loop_only), "--output", tmp_path / "out", *tiny_loop, "--iterations", 4)
    folder = tmp_path / "out/quickstart"
    assert done.status == 0, done.err
    assert sorted(p.name for p in (folder / "pictures").glob("*.json")) == ["0000001.json", "0000003.json"]
    points, pairs = history.read(RunFolder(folder))
    assert [p["iteration"] for p in points] == [1, 3] and pairs == []
    assert len(list((folder / "pictures").glob("*.jpg"))) == 6 == sum(len(p["pictures"]) for p in points)
    assert points[0]["scores"] == sorted(points[0]["scores"], reverse=True)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(history, "write_atomically", full)
    done = cli("run", saved(loop_only), "--output", tmp_path / "out", "--run", "full", *tiny_loop, "--iterations", 1)
    assert done.status == 0 and len([line for line in done.err if "pictures for the report" in line]) == 1


def test_the_environment_is_told_again_where_it_changed(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    environment.note(folder, 0)
    environment.note(folder, 4)
    assert [entry["from_iteration"] for entry in environment.read(tmp_path)] == [0]
    monkeypatch.setattr(environment, "_version", lambda name: "9.9")
    environment.note(folder, 6)
    assert [(e["from_iteration"], e["packages"]["torch"] == "9.9") for e in environment.read(tmp_path)] == [(0, False), (6, True)]
    monkeypatch.undo()
    environment.note(folder, 2)  # went back behind the sixth
    assert [entry["from_iteration"] for entry in environment.read(tmp_path)] == [0]


def test_rewards_are_told_as_means_of_some_iterations(tmp_path):
    seen = overview.of(made(tmp_path / "run"))
    assert (seen.window, seen.iteration, seen.best_at) == (10, 40, 40)
    assert seen.first == pytest.approx(0.55) and seen.last == seen.best == pytest.approx(3.55) and seen.seconds == 2.0
