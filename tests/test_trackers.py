"""Trackers: what is logged where, that a resumed run goes on in its log, and that none of them costs a run anything."""

import json
import math

import pytest
from PIL import Image

from comfy_dancegrpo import processes, settings
from comfy_dancegrpo.runs import metrics, trackers
from comfy_dancegrpo.runs.folder import RunFolder
from comfy_dancegrpo.workflow.host import Host, use


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """`mine(**settings)`: writes the user's settings file, which is not there before."""
    monkeypatch.setenv(settings.PATH, str(tmp_path / "settings.json"))
    return lambda **values: (tmp_path / "settings.json").write_text(json.dumps(values), encoding="utf-8")


def events(folder):
    """What TensorBoard itself reads of a log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    read.Reload()
    return read


def scalar(read, tag):
    return [(event.step, event.value) for event in read.Scalars(tag)]


def test_tensorboard_has_the_metrics_the_watched_rewards_and_pictures_and_goes_on_where_the_run_does(cli, loop_only, saved, tiny_loop, tmp_path):
    watch = {"class_type": "DanceGRPOWatch", "inputs": {
        "policy": ["4", 0], "update": next([i, 0] for i, node in loop_only.items() if node["class_type"] == "DanceGRPOUpdate"), "prompts": ["2", 0], "reward": ["3", 0],
        "every": 1, "max_drop": 0.0, "patience": 1, "below": "best", "steps": 2, "shift": 1.0, "guidance_scale": 3.5, "width": 64, "height": 64, "noise_seed": 0,
        "samples_per_prompt": 1, "batch_size": 4}}
    path = saved({**loop_only, "20": watch, "2": {**loop_only["2"], "inputs": {**loop_only["2"]["inputs"], "limit": 4}}})
    words = ["run", path, "--output", tmp_path / "out", *tiny_loop, "--track", "tensorboard"]
    assert (done := cli(*words)).status == 0, done.err
    done = cli(*words, "--iterations", 4, "--set", "Loop Start.on_existing=resume")
    assert done.status == 0, done.err
    folder = tmp_path / "out/quickstart"
    rows, read = metrics.read(folder / "metrics.jsonl"), events(folder)
    assert len(rows) == 4 and len(list((folder / "tensorboard").rglob("events.*"))) == 2
    for tag, value in (("train/reward_mean", lambda row: row["reward_mean"]), ("rewards/clip_score/mean", lambda row: row["rewards"]["clip_score"]["mean"]),
                       ("seconds/total", lambda row: row["seconds"]["total"])):
        assert scalar(read, tag) == [(row["iteration"], pytest.approx(value(row))) for row in rows], tag
    watched = metrics.read(folder / "watch.jsonl")
    assert [row["iteration"] for row in watched] == [0, 1, 2, 3, 4]
    assert scalar(read, "watch/clip_score") == [(row["iteration"], pytest.approx(row["rewards"]["clip_score"])) for row in watched]
    images = read.Images("group") if "group" in read.Tags()["images"] else [i for tag in sorted(read.Tags()["images"]) if tag.startswith("group/") for i in read.Images(tag)]
    assert {image.step for image in images} == {1, 2, 3, 4} and all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)
    assert "learning_rate" in read.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()


def logged(folder, iteration, values, watched=(), pictures=()):
    """A log that is opened after `iteration`, and gets one row for each value."""
    log = trackers.Trackers(RunFolder(folder), iteration)
    for k, value in enumerate(values, iteration + 1):
        log.log({"iteration": k, "reward_mean": value, "rewards": {"a": {"mean": value}}, "time": 1.0}, watched, pictures, "a prompt")
    log.close()


@pytest.fixture
def tracked():
    """`with tracked("tensorboard"):` as the command line asks."""

    class Saying(Host):
        said: list[str]

        def say(self, line):
            self.said.append(line)

    def make(*names):
        host = Saying()
        host.trackers, host.said = names, []
        return use(host)

    return make


def test_what_was_logged_after_the_checkpoint_is_replaced(tmp_path, tracked):
    with tracked("tensorboard"):
        logged(tmp_path, 0, [0.1, 0.2, 0.3, 0.4, 0.5])
        logged(tmp_path, 3, [7.0])  # killed after the fifth, its last checkpoint was of the third
    assert scalar(events(tmp_path), "train/reward_mean") == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2)), (3, pytest.approx(0.3)), (4, 7.0)]
    with tracked("tensorboard"):
        logged(tmp_path, 0, [9.0])  # killed before its first checkpoint
    assert scalar(events(tmp_path), "train/reward_mean") == [(1, 9.0)]


def records(file):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes (blocks of 32 KiB; of a piece CRC, length, kind; kinds whole, first, middle, last)."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_offline_has_them_too_under_one_id(tmp_path, tracked, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "prompt.json").write_text(json.dumps({"4": {"class_type": "X", "inputs": {"seed": 7}, "_meta": {"title": "Loop Start"}}}))
    with tracked("wandb") as host:
        logged(folder, 0, [0.1, 0.2], watched=[{"iteration": 0, "rewards": {"w": 0.5}}], pictures=[Image.new("RGB", (8, 8), "red")] * 2)
        logged(folder, 2, [0.3])
        assert host.said == []
    seen, ids, names, configs = {}, set(), set(), {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id), names.add(record.run.display_name)
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                seen[items["_step"]] = seen.get(items["_step"], {}) | items
            for update in record.run.config.update if record.HasField("run") else record.config.update:
                configs[update.key or "/".join(update.nested_key)] = update.value_json
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2 and names == {"my run"}
    assert ids == {json.loads((folder / "trackers.json").read_text())["wandb"]}
    assert [seen[k]["train/reward_mean"] for k in (1, 2, 3)] == [0.1, 0.2, 0.3] and seen[0]["watch/w"] == 0.5
    assert any(key.startswith("group") for key in seen[1]) and len(list((folder / "wandb").rglob("*.png"))) >= 2
    assert configs["Loop Start.seed"] == "7"


@pytest.mark.parametrize("where", ["command line", "settings"])
@pytest.mark.parametrize("name, told", [("neptune", "accepted: tensorboard, wandb"), ("mlflow", "pip install mlflow")])
def test_one_that_cannot_be_is_a_line_before_anything_is_loaded(cli, loop_only, saved, tmp_path, mine, monkeypatch, where, name, told):
    found = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None if package == "mlflow" else found(package))
    words = ["--track", name]
    if where == "settings":
        mine(trackers=[name])
        words = []
    for command in ("run",) if words else ("run", "validate"):
        done = cli(command, saved(loop_only), "--output", tmp_path / "out", *words)
        assert done.status == 2 and len(done.verdict) == 1, done.err
        assert repr(name) in done.verdict[0] and told in done.verdict[0]
        assert ("--track" if words else str(settings.path())) in done.verdict[0]
    assert not (tmp_path / "out").exists()


def test_settings_that_are_wrong_are_a_line(mine):
    mine(trackers="wandb")
    assert trackers.problem_of_settings() == f"the settings {settings.path()}: \"trackers\": found 'wandb', accepted: a list of names"
    mine(trackers=["tensorboard"])
    assert trackers.problem_of_settings() is None and trackers.wanted() == ["tensorboard"]


def test_a_workflow_names_no_tracker(tmp_path):
    assert trackers.wanted() == []
    logged(tmp_path, 0, [0.1])
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_logs(tmp_path, tracked, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with tracked("tensorboard"):
        logged(tmp_path, 0, [0.1])
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_resumes_names_them_again(tmp_path):
    from comfy_dancegrpo.trainer.session import Options, how_to_resume

    host = Host()
    host.run_folder = tmp_path / "a"
    assert "--track tensorboard --track wandb" in how_to_resume(host, tmp_path / "flow.json", Options(track=["tensorboard", "wandb"]))


class Faulty:
    """A tracker that fails in one call; `calls` tells which were made."""

    def __init__(self, where):
        self.where, self.calls = where, []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name == self.where:
                raise ConnectionError("no route\nto host")
        return call


@pytest.mark.parametrize("where", ["start", "store_init_configuration", "log", "log_images", "finish"])
def test_one_that_fails_is_said_once_and_left_out_and_the_other_goes_on(tmp_path, tracked, monkeypatch, where):
    faulty, started = Faulty(where), trackers._started

    def start(name, folder, iteration):
        if name != "wandb":
            return started(name, folder, iteration)
        faulty.start()
        return faulty

    monkeypatch.setattr(trackers, "_started", start)
    with tracked("wandb", "tensorboard") as host:
        logged(tmp_path, 0, [0.1, 0.2], pictures=[Image.new("RGB", (8, 8))])
        assert host.said == ["tracker wandb: ConnectionError: no route to host; it is left out from here on, and the run goes on"]
    assert faulty.calls[-1] == where and faulty.calls.count(where) == 1
    assert [step for step, _ in scalar(events(tmp_path), "train/reward_mean")] == [1, 2]


def test_numbers_are_named_by_their_path_and_the_rest_is_left_out():
    row = {"iteration": 3, "time": 1.0, "reward_mean": 0.5, "grad_norm": math.nan, "note": "x", "none": None, "rewards": {"a": {"mean": 1, "weight": 2.0}}}
    found = trackers.scalars(row)
    assert math.isnan(found.pop("train/grad_norm"))
    assert found == {"train/reward_mean": 0.5, "rewards/a/mean": 1, "rewards/a/weight": 2.0}
