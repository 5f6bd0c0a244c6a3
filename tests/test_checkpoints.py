"""The run folder: what survives a crash, which run a folder holds, and which names are refused."""

import json
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.runs import checkpoints, metrics
from comfy_dancegrpo.runs.folder import RunFolder, checked_name, choose, write_atomically
from comfy_dancegrpo.workflow.host import Host, use


class Listening(Host):
    def __init__(self, output):
        super().__init__(output=output)
        self.said = []

    def say(self, line):
        self.said.append(line)


@pytest.fixture
def host(tmp_path):
    with use(Listening(tmp_path)) as active:
        yield active


def state(k):
    return {"parameters.w": torch.full((3, 2), float(k)), "optimizer.step.w": torch.tensor(float(k)), "version": torch.tensor(k)}


def save(folder, k, kept=2, **more):
    return checkpoints.save(folder, checkpoints.Checkpoint(k, state(k), 16, "same", 1)._replace(**more), kept)


# -- checkpoints ------------------------------------------------------------------------------------------------------------------
def test_the_newest_comes_back_bit_for_bit_and_two_are_kept(tmp_path, host):
    assert checkpoints.newest(tmp_path / "none") is None
    for k in (2, 10, 110):
        save(tmp_path, k)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000010.safetensors", "0000110.safetensors"]
    iterations, tensors, micro_batch, fingerprint, count = checkpoints.newest(tmp_path)
    assert (iterations, micro_batch, fingerprint, count) == (110, 16, "same", 1) and tensors.keys() == state(0).keys()
    assert all(torch.equal(value, tensors[name]) and value.dtype == tensors[name].dtype for name, value in state(110).items())
    assert host.said == []


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: data[:4], lambda data: b"",
    lambda data: b"\xff" * 8 + data[8:], lambda data: data.replace(b'"iterations"', b'"iteratioms"'),
])
def test_a_damaged_newest_is_named_and_passed_over(tmp_path, host, damage):
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    newest.write_bytes(damage(newest.read_bytes()))
    iterations, tensors, *_ = checkpoints.newest(tmp_path)
    assert iterations == 10 and torch.equal(tensors["version"], torch.tensor(10))
    assert len(host.said) == 1 and f"checkpoint {newest} is damaged" in host.said[0]


def test_no_single_bit_goes_unnoticed(tmp_path, host):
    """Each bit of the file in turn: what is read is all that was written, or the file is named."""
    path, whole = save(tmp_path, 20), checkpoints.newest(tmp_path)
    data, named = path.read_bytes(), 0
    for at in range(8 * len(data)):
        host.said.clear()
        path.write_bytes(data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1:])
        found = checkpoints.load(path)
        named += found is None
        if found is None:
            assert len(host.said) == 1 and f"checkpoint {path} is damaged" in host.said[0] and "\n" not in host.said[0]
        else:
            assert found._replace(tensors=None) == whole._replace(tensors=None) and found.tensors.keys() == whole.tensors.keys()
            assert all(torch.equal(found.tensors[name], value) and found.tensors[name].dtype == value.dtype for name, value in whole.tensors.items())
    print(f"{named} of {8 * len(data)} bits")
    assert named > 8 * len(data) * 0.9  # the others are spaces, and the order of names


def test_one_of_another_workflow_and_one_without_a_checksum(tmp_path, host):
    save(tmp_path, 10)
    other = save(tmp_path, 20, fingerprint="other")
    assert checkpoints.newest(tmp_path, "same").iterations == 10 and "of another workflow" in host.said[0]
    save_file(state(30), tmp_path / "0000030.safetensors", metadata={"iterations": "30", "micro_batch": "16"})  # of an older version
    assert checkpoints.newest(tmp_path, "same").iterations == 30
    save_file(state(30), other, metadata={"iterations": "20", "micro_batch": "16", "fingerprint": "same", "processes": "1"})
    assert checkpoints.load(other) is None


@pytest.mark.parametrize("kept, left", [(1, [20, 25, 30]), (2, [10, 20, 25, 30]), (0, [5, 10, 20, 25, 30])])
def test_those_that_are_kept_are_counted_from_the_one_that_is_written(tmp_path, host, kept, left):
    """A damaged later one, that was passed over, takes no place of a whole one."""
    for k in (5, 10, 25, 30):
        save(tmp_path, k, kept=0)
    save(tmp_path, 20, kept)
    assert sorted(int(p.stem) for p in tmp_path.iterdir()) == left


def test_what_fails_behind_is_raised_once_by_the_next_call():
    writer, go = checkpoints.Writer(), threading.Event()

    def fail():
        go.wait()
        raise OSError(28, "No space left on device")

    writer.start(fail)
    writer.check()  # it goes on
    go.set()
    with pytest.raises(OSError, match="No space"):
        writer.start(pytest.fail)
    writer.wait()
    done = []
    writer.start(lambda: done.append(1))
    writer.wait()
    assert done == [1]


def test_a_write_that_fails_leaves_the_former_ones(tmp_path, host, monkeypatch):
    save(tmp_path, 10)

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", half)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 20)
    assert checkpoints.newest(tmp_path)[0] == 10 and host.said == []  # the half one is not even looked at
    save(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000010.safetensors", "0000020.safetensors"]


# -- files ------------------------------------------------------------------------------------------------------------------------
def test_writing_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "run.json"
    write_atomically(path, "first\n")
    write_atomically(path, "sécond\n")
    assert path.read_bytes() == "sécond\n".encode()

    def crash(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "third\n")
    assert path.read_text(encoding="utf-8") == "sécond\n"


@pytest.mark.parametrize("name", ["run", "Run 2", "flux-dev_r16.v2", "été", "0", "console", "x" * 100])
def test_names(name):
    assert checked_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/tmp", "C:x", ".hidden", "x.", "x ", " x", "a\nb", "a\0b", "-x",
                                  "x" * 101, "a:b", "a*", "~", "nul", "CON.txt", "com1"])
def test_names_that_leave_the_folder_or_that_some_system_refuses(name, host):
    with pytest.raises(RunError) as error:
        choose(name, "f", 5, 16, "new")
    assert str(error.value).startswith('input "run_name": found ') and "\n" not in str(error.value)


# -- which run ----------------------------------------------------------------------------------------------------------------------
def made(host, name="run", fingerprint="same", **record):
    folder = RunFolder(host.output_folder / name)
    folder.create(fingerprint, 16)
    folder.write_record(**record)
    (folder.path / "left.txt").write_text("of the former run")
    return folder


@pytest.mark.parametrize("on_existing", ["new", "resume", "restart"])
def test_where_there_is_nothing_a_run_starts(host, on_existing):
    folder, action = choose("run", "same", 5, 16, on_existing)
    assert action == "start" and folder.path == host.output_folder / "run" and not folder.path.exists()


@pytest.mark.parametrize("on_existing, record, fingerprint, name, action", [
    ("new", {"state": "finished", "iterations": 5}, "same", "run", "reopen"),
    ("new", {"state": "finished", "iterations": 5}, "other", "run-2", "start"),
    ("new", {"state": "finished", "iterations": 4}, "same", "run-2", "start"),
    ("new", {"state": "stopped", "iterations": 5}, "same", "run-2", "start"),
    ("new", {"state": "running", "iterations": 0}, "same", "run-2", "start"),
    ("resume", {"state": "stopped", "iterations": 3}, "same", "run", "resume"),
    ("resume", {"state": "running", "iterations": 0}, "same", "run", "resume"),
    ("resume", {"state": "finished", "iterations": 3}, "same", "run", "resume"),
    ("resume", {"state": "finished", "iterations": 5}, "same", "run", "reopen"),
    ("restart", {"state": "finished", "iterations": 5}, "same", "run", "start"),
    ("restart", {"state": "running", "iterations": 2}, "other", "run", "start"),
])
def test_what_is_done_where_there_is_a_run(host, on_existing, record, fingerprint, name, action):
    former = made(host, **record)
    folder, chosen = choose("run", fingerprint, 5, 16, on_existing)
    assert (folder.name, chosen) == (name, action)
    assert (former.path / "left.txt").exists()  # choosing deletes nothing
    if on_existing == "restart":
        folder.create(fingerprint, 16)
        assert [p.name for p in former.path.iterdir()] == ["run.json"] and [p.name for p in host.output_folder.iterdir()] == ["run"]


def test_another_micro_batch_is_no_other_run_but_is_not_reopened_either(host):
    made(host, state="finished", iterations=5)
    assert choose("run", "same", 5, 8, "new")[0].name == "run-2"
    assert choose("run", "same", 5, 8, "resume")[1] == "reopen"


def test_resuming_with_fewer_iterations_than_are_done_is_refused(host):
    made(host, state="finished", iterations=60)
    with pytest.raises(RunError, match="found 30, and run 'run' in .* has already done 60"):
        choose("run", "same", 30, 16, "resume")


def test_a_damaged_record_is_named(host):
    (made(host).path / "run.json").write_text("{")
    with pytest.raises(RunError, match="run.json is damaged"):
        choose("run", "same", 5, 16, "resume")


def test_the_next_free_name(host):
    for name in ("run", "run-2", "run-3"):
        made(host, name)
    assert choose("run", "other", 5, 16, "new")[0].name == "run-4"


def test_resuming_a_run_of_another_workflow_says_what_changed(host):
    host.prompt = {"1": {"class_type": "Loop", "inputs": {"rate": 0.1, "run_name": "a"}, "_meta": {"title": "The loop"}},
                   "2": {"class_type": "Old", "inputs": {}}}
    folder = made(host, state="stopped", iterations=3)
    host.prompt = {"1": {"class_type": "Loop", "inputs": {"rate": 0.2, "run_name": "b"}, "_meta": {"title": "The loop"}},
                   "3": {"class_type": "New", "inputs": {}}}
    with pytest.raises(RunError) as error:
        choose("run", "other", 5, 16, "resume")
    line = str(error.value)
    assert "The loop.rate was 0.1 and is 0.2; node 2 was added or removed; node 3 was added or removed" in line
    assert "run_name was" not in line and "\n" not in line
    assert (folder.path / "left.txt").exists()


@pytest.mark.parametrize("on_existing", ["resume", "restart"])
def test_a_folder_that_is_not_a_runs_is_never_touched(host, on_existing):
    (host.output_folder / "photos").mkdir()
    (host.output_folder / "photos" / "dear.jpg").write_bytes(b"1")
    with pytest.raises(RunError, match="is not a run of this program"):
        choose("photos", "f", 5, 16, on_existing)
    assert (host.output_folder / "photos" / "dear.jpg").exists()
    assert choose("photos", "f", 5, 16, "new")[0].name == "photos-2"


def test_what_a_run_begins_with(host):
    host.workflow_source, host.prompt = b'{"as": "given"}', {"1": {"class_type": "X", "inputs": {}}}
    folder = RunFolder(host.output_folder / "run")
    folder.create("print", 16)
    assert (folder.path / "workflow.json").read_bytes() == b'{"as": "given"}'
    assert json.loads((folder.path / "prompt.json").read_text()) == host.prompt
    assert (folder.record["state"], folder.record["iterations"], folder.record["fingerprint"]) == ("running", 0, "print")


@pytest.mark.parametrize("order", [("15", "7", "12:3"), ("12:3", "7", "15", "7"), ("7", "15", "12:3", "15")])
def test_each_evaluate_has_its_own_entries_in_whatever_order_they_run(host, order):
    nodes = {"7", "15", "12:3"}  # of the workflow; a host may know no prompt, or that of an earlier one
    folder = RunFolder(host.output_folder / "run")
    for node in order:
        folder.add_evaluations(node, {"clip": {"gain": f"of {node}"}, **({"exact": {"gain": 2}} if node == "15" else {})}, nodes)
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["evaluations"] == {"clip": {"gain": "of 7"}, "clip_2": {"gain": "of 12:3"}, "clip_3": {"gain": "of 15"}, "exact": {"gain": 2}}
    folder.add_evaluations("15", {"clip": {"gain": 5}}, {"15"})  # the others were taken out of the workflow
    assert json.loads((folder.path / "summary.json").read_text())["evaluations"] == {"clip": {"gain": 5}}


# -- metrics ------------------------------------------------------------------------------------------------------------------------
def rows(*iterations):
    return [{"iteration": k, "reward_mean": k / 8} for k in iterations]


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.read(path) == []
    for row in rows(1, 2, 3):
        metrics.append(path, row)
    metrics.cut_after(path, 2)
    assert metrics.read(path) == rows(1, 2) and path.read_text().endswith("}\n")
    metrics.append(path, rows(3)[0])
    assert metrics.read(path) == rows(1, 2, 3)


@pytest.mark.parametrize("half", ['{"iteration": 3, "rew', '{"iteration": 3, "reward_mean": 0.375}', "{"])
def test_half_a_last_line_is_left_out(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    for row in rows(1, 2):
        metrics.append(path, row)
    with path.open("a") as file:
        file.write(half)
    assert metrics.read(path) == rows(1, 2)
    metrics.cut_after(path, 2)
    metrics.append(path, rows(3)[0])
    assert metrics.read(path) == rows(1, 2, 3)
