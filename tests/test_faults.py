"""What goes wrong while a run trains: status 3 or 130, one line that says how to go on, and the checkpoint kept."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comfy_dancegrpo import rewards
from comfy_dancegrpo.grpo.learner import Learner
from comfy_dancegrpo.runs import checkpoints
from comfy_dancegrpo.trainer.console import ConsoleHost

ITERATIONS = 10


def brightness(pictures, prompts):
    return pictures.mean(dim=(1, 2, 3)) * 100


@pytest.fixture
def reward(monkeypatch):
    """`reward(function)`: a reward named of_a_test."""

    def register(function):
        module = types.ModuleType("comfy_dancegrpo.rewards.of_a_test")
        module.load = lambda source: function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(rewards.REWARDS, "of_a_test", rewards.Kind("of_a_test"))

    return register


def lora(folder):
    (path,) = (folder / "lora").iterdir()
    return load_file(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resume_words(verdict):
    """The words of the command that a line tells, without the program's name."""
    program, *words = shlex.split(verdict.partition("; resume with: ")[2])
    assert program == "dancegrpo"
    return words


@pytest.fixture(scope="module")
def whole(cli, quickstart, tiny, tmp_path_factory):
    """A run of ten iterations that nothing disturbs: its LoRA."""
    output = tmp_path_factory.mktemp("whole")
    done = cli("run", quickstart, "--output", output, *tiny, "--iterations", ITERATIONS)
    assert done.status == 0, done.err
    return lora(output / "quickstart")


def kept(folder, iterations):
    """Asserts that the newest checkpoint is of so many iterations and whole, and that no half of one lies beside it."""
    found, tensors, micro_batch, *_ = checkpoints.newest(folder / "checkpoints")
    assert (found, micro_batch) == (iterations, 4) and all(bool(t.isfinite().all()) for t in tensors.values())
    assert not list(folder.rglob("*.part"))


def broken(values):
    raise LookupError("no such thing\nas this")


@pytest.mark.parametrize("what, spoil, tries, said", [
    ("NaN", lambda v: v.index_fill(0, torch.tensor([1]), torch.nan), 2, "found nan for the prompt '"),
    ("infinity", lambda v: v.index_fill(0, torch.tensor([5]), torch.inf), 2, "found inf for the prompt '"),
    ("too few", lambda v: v[:-1], 1, "found 5 scores for 6 pictures; what"),
    ("too many", lambda v: torch.cat([v, v]), 1, "found 12 scores for 6 pictures; what"),
    ("broken", broken, 2, "LookupError: no such thing (2 tries); what"),
])
def test_a_reward_that_fails(cli, loop_only, saved, tiny_loop, tmp_path, reward, what, spoil, tries, said):
    called = []

    def failing(pictures, prompts):
        called.append(prompts)
        values = brightness(pictures, prompts)
        return values if len(called) < 2 else spoil(values)

    reward(failing)
    loop_only["3"]["inputs"]["reward"] = "of_a_test"
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop)
    (line,) = done.verdict
    print(f"\n{what}: {line}")
    assert done.status == 3 and done.err[-1].endswith(line) and len(called) == 1 + tries and called[-1] == called[1]
    assert line.startswith("node 6 \"Score\" (DanceGRPOScore): reward 'of_a_test': " + said)
    assert resume_words(line)[:2] == ["run", str(tmp_path / "flow.json")]
    kept(tmp_path / "quickstart", 1)
    assert lora(tmp_path / "quickstart")
    evidence = tmp_path / "quickstart" / "failed_reward" / "of_a_test-1"
    assert f"; what it was given is in {evidence}; resume with: " in line
    record = json.loads((evidence / "fault.json").read_text())
    assert [sample["prompt"] for sample in record["samples"]] == list(called[1]) and line.partition("; what")[0].endswith(record["fault"])
    assert (what == "broken") == (record["answer"] == "")  # else the scores, which are the answer
    assert all(Image.open(evidence / sample["file"]).size == (64, 64) for sample in record["samples"])


def test_a_reward_that_fails_once_is_tried_again_and_nothing_is_lost(cli, loop_only, saved, tiny_loop, tmp_path, reward):
    called = []

    def failing_once(pictures, prompts):
        called.append(prompts)
        return broken(None) if len(called) == 2 else brightness(pictures, prompts)

    loop_only["3"]["inputs"]["reward"] = "of_a_test"
    reward(brightness)
    assert cli("run", saved(loop_only), "--output", tmp_path / "whole", *tiny_loop).status == 0
    reward(failing_once)
    done = cli("run", saved(loop_only), "--output", tmp_path / "again", *tiny_loop)
    assert done.status == 0 and any("reward 'of_a_test': LookupError: no such thing; it is tried again" in line for line in done.err)
    assert called[2] == called[1] and not (tmp_path / "again/quickstart/failed_reward").exists()
    assert equal(lora(tmp_path / "again/quickstart"), lora(tmp_path / "whole/quickstart"))


def test_a_reward_that_fails_at_once_and_is_mended(cli, loop_only, saved, tiny_loop, tmp_path, reward):
    """In the first iteration, before there is a checkpoint: what it was given stays, and the run is the one that nothing disturbed."""
    reward(lambda pictures, prompts: broken(None))
    loop_only["3"]["inputs"]["reward"] = "of_a_test"
    done = cli("run", saved(loop_only), "--output", tmp_path / "mended", *tiny_loop)
    (line,) = done.verdict
    assert done.status == 3 and (tmp_path / "mended/quickstart/failed_reward/of_a_test-1/fault.json").is_file()
    reward(brightness)
    assert cli(*resume_words(line)).status == 0
    assert cli("run", saved(loop_only), "--output", tmp_path / "whole", *tiny_loop).status == 0
    assert equal(lora(tmp_path / "mended/quickstart"), lora(tmp_path / "whole/quickstart"))


def test_a_group_of_one(cli, loop_only, saved, tiny_loop, tmp_path):
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--set", "Group Sample.group_size=1")
    (line,) = done.verdict
    print(f"\ngroup of one: {line}")
    assert done.status == 3 and 'node 5 "Group Sample"' in line and 'input "group_size": found 1, accepted: 2 or more' in line


def test_a_full_disk(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch, whole):
    written, save_file = [], checkpoints.save_file

    def save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        written.append(path)
        if len(written) > 1:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "save_file", save)
    words = ["run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--iterations", ITERATIONS]
    done = cli(*words, "--set", "Loop Start.checkpoint_every=1")
    (line,) = done.verdict
    print(f"\nfull disk: {line}")
    assert done.status == 3 and line.startswith("the disk is full: ") and os.strerror(errno.ENOSPC) in line
    kept(tmp_path / "quickstart", 1)
    monkeypatch.undo()
    assert cli(*resume_words(line)).status == 0
    assert equal(lora(tmp_path / "quickstart"), whole)


def test_stopped_within_an_update(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch, whole):
    """After the first of the fourth iteration's two optimizer steps: what it did to the weights is not kept."""
    steps, optimizer_step, check_interrupt = [], Learner.optimizer_step, ConsoleHost.check_interrupt

    def step(self):
        optimizer_step(self)
        steps.append(self.version)

    def check(self):
        if len(steps) == 7:
            self._stopped_by = signal.SIGINT
        check_interrupt(self)

    monkeypatch.setattr(Learner, "optimizer_step", step)
    monkeypatch.setattr(ConsoleHost, "check_interrupt", check)
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--iterations", ITERATIONS)
    (line,) = done.verdict
    print(f"\nstopped within an update: {line}")
    assert done.status == 130 and line.startswith("stopped; resume with: ") and len(steps) == 7
    kept(tmp_path / "quickstart", 3)
    assert len((tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()) == 3
    stopped = lora(tmp_path / "quickstart")
    monkeypatch.undo()
    done = cli(*resume_words(line))
    assert done.status == 0 and any("goes on after iteration 3" in said for said in done.err)
    assert not equal(lora(tmp_path / "quickstart"), stopped) and equal(lora(tmp_path / "quickstart"), whole)


def sent(signum, words, cwd, after=2):
    """The program in a process of its own, sent a signal when it tells the end of an iteration: its status and lines of stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are exact at an equal number of threads
    process = subprocess.Popen([sys.executable, "-m", "comfy_dancegrpo.trainer", *map(str, words)], cwd=cwd, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = []
    with process.stderr:
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            if line.startswith(f"{after}/{ITERATIONS} "):
                process.send_signal(signum)
    return process.wait(60), lines


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT that a test could send")
def test_control_c(cli, loop_only, saved, tiny_loop, tmp_path, whole):
    status, lines = sent(signal.SIGINT, ["run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--iterations", ITERATIONS], tmp_path)
    assert status == 130 and not any("Traceback" in line for line in lines), lines
    (line,) = [line for line in lines if line.startswith("dancegrpo: ")]
    print(f"\nCtrl-C: {line}")
    assert line == lines[-1] and line.startswith("dancegrpo: stopped; resume with: ")
    done = sum(line.partition("/")[0].isdigit() for line in lines)
    assert 2 <= done < ITERATIONS
    kept(tmp_path / "quickstart", done)
    assert cli(*resume_words(line)).status == 0
    assert equal(lora(tmp_path / "quickstart"), whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed(cli, loop_only, saved, tiny_loop, tmp_path, whole):
    words = ["run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--iterations", ITERATIONS, "--set", "Loop Start.checkpoint_every=2"]
    status, lines = sent(signal.SIGKILL, words, tmp_path, after=4)  # the checkpoint before the last is whole by then, the last may not be
    assert status == -signal.SIGKILL and not any(line.startswith("dancegrpo: ") for line in lines)
    assert checkpoints.newest(tmp_path / "quickstart" / "checkpoints")[0] < ITERATIONS
    done = cli(*words, "--set", "Loop Start.on_existing=resume")
    assert done.status == 0 and any("goes on after iteration " in said for said in done.err)
    assert equal(lora(tmp_path / "quickstart"), whole)
    iterations = [json.loads(row)["iteration"] for row in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert iterations == list(range(1, ITERATIONS + 1))
