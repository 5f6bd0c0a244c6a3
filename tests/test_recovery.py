"""Faults that a run survives, or ends by in one line and goes on from: memory that does not suffice, NaN, damaged checkpoints, a clock that jumps,
processes that hang."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from comfy_dancegrpo import pulse, settings
from comfy_dancegrpo.grpo.learner import Learner
from comfy_dancegrpo.policies.base import Policy
from comfy_dancegrpo.runs import checkpoints

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 4
CLOCK = ("seconds", "time")
linux = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that a test could send")


@pytest.fixture
def flow(loop_only, saved, tiny_loop):
    """The words of a short run."""
    return ["run", saved(loop_only), *tiny_loop, "--iterations", ITERATIONS, "--set", "Loop Start.checkpoint_every=1"]


def lora(output):
    (path,) = (output / "quickstart" / "lora").glob("*.safetensors")
    return load_file(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(output):
    lines = (output / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def resume_words(line):
    return shlex.split(line.partition("; resume with: ")[2])[1:]


@pytest.fixture
def scarce(monkeypatch):
    """`scarce(size, calls)`: from this call of the model on, memory suffices for micro-batches up to this size."""
    predict = Policy.predict

    def limit(size, calls=0):
        made = []

        def limited(self, x, *arguments):
            made.append(len(x))
            if len(made) > calls and len(x) > size:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return predict(self, x, *arguments)

        monkeypatch.setattr(Policy, "predict", limited)
        return made

    return limit


# -- memory -----------------------------------------------------------------------------------------------------------------------
def test_out_of_memory_stops_in_one_line_unless_asked_otherwise(cli, flow, tmp_path, scarce):
    calls = sum_of_calls(cli, flow, tmp_path, scarce)
    scarce(2, calls // 2 + 3)
    done = cli(*flow, "--output", tmp_path / "stopped")
    (line,) = done.verdict
    print(f"\nout of memory: {line}")
    assert done.status == 3 and 'out of memory; lower Loop Start\'s "micro_batch" first' in line and "; resume with: " in line
    assert checkpoints.newest(tmp_path / "stopped/quickstart/checkpoints").iterations == ITERATIONS // 2


def sum_of_calls(cli, flow, tmp_path, scarce):
    """How many calls of the model the whole run makes."""
    made = scarce(8)
    assert cli(*flow, "--output", tmp_path / "whole").status == 0
    return len(made)


def test_out_of_memory_goes_on_with_half_the_micro_batch(cli, flow, tmp_path, scarce, monkeypatch):
    """In the third iteration: it is the run that was stopped after the second, and resumed by hand with half the size."""
    calls = sum_of_calls(cli, flow, tmp_path, scarce)
    scarce(2, calls // 2 + 3)
    halving = ["--set", "Loop Start.on_out_of_memory=halve"]
    done = cli(*flow, *halving, "--output", tmp_path / "halved")
    assert done.status == 0, done.err
    (warning,) = [line for line in done.err if line.startswith("WARNING")]
    print(f"\n{warning}")
    assert "out of memory" in warning and f"started again after iteration {ITERATIONS // 2}, with half the micro-batch" in warning
    assert any("the micro-batch size changes from 4 to 2" in line for line in done.err)
    newest = checkpoints.newest(tmp_path / "halved/quickstart/checkpoints")
    assert (newest.iterations, newest.micro_batch) == (ITERATIONS, 2)
    monkeypatch.undo()
    assert cli(*flow, "--iterations", ITERATIONS // 2, "--output", tmp_path / "by_hand").status == 0
    (tmp_path / "by_hand/quickstart/lora/quickstart.safetensors").unlink()
    assert cli(*flow, "--resume", "--set", "Loop Start.micro_batch=2", "--output", tmp_path / "by_hand").status == 0
    assert equal(lora(tmp_path / "halved"), lora(tmp_path / "by_hand")) and rows(tmp_path / "halved") == rows(tmp_path / "by_hand")
    done = cli(*flow, *halving, "--resume", "--iterations", ITERATIONS + 1, "--output", tmp_path / "halved")  # the size stays the run's
    assert done.status == 0 and any("goes on with 2 instead of 4" in line for line in done.err)


def test_out_of_memory_from_the_first_call_on(cli, flow, tmp_path, scarce, monkeypatch):
    """Twice halved before anything is done; a run of one that has no half left stops."""
    scarce(1)
    done = cli(*flow, "--set", "Loop Start.on_out_of_memory=halve", "--output", tmp_path / "halved")
    assert done.status == 0 and len([line for line in done.err if line.startswith("WARNING")]) == 2
    scarce(0)
    done = cli(*flow, "--set", "Loop Start.on_out_of_memory=halve", "--output", tmp_path / "none")
    (line,) = done.verdict
    assert done.status == 3 and "out of memory" in line
    monkeypatch.undo()
    assert cli(*flow, "--set", "Loop Start.micro_batch=1", "--output", tmp_path / "one").status == 0
    assert equal(lora(tmp_path / "halved"), lora(tmp_path / "one"))


# -- numbers, files, clocks --------------------------------------------------------------------------------------------------------
def test_nan_is_skipped_counted_and_stops_the_run(cli, flow, tmp_path, monkeypatch):
    clip, steps = Learner.clip_grad_norm, []

    def poisoned(self, limit):
        steps.append(1)
        return float("nan") if len(steps) in (2, 5, 6, 7) else clip(self, limit)

    monkeypatch.setattr(Learner, "clip_grad_norm", poisoned)
    done = cli(*flow, "--set", "Update.max_skipped_steps=2", "--output", tmp_path / "poisoned")
    (line,) = done.verdict
    print(f"\nNaN: {line}")
    assert done.status == 3 and 'node 9 "Update"' in line and "optimizer step 3 in a row" in line
    assert [row["skipped_steps"] for row in rows(tmp_path / "poisoned")] == [1, 0, 2]
    warnings = [said for said in done.err if said.startswith("WARNING")]
    assert len(warnings) == 2 and "NaN or infinite: 2 (2 in a row by now)" in warnings[1]
    monkeypatch.undo()
    assert cli(*resume_words(line)).status == 0
    assert [row["iteration"] for row in rows(tmp_path / "poisoned")] == list(range(1, ITERATIONS + 1))


def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(cli, flow, tmp_path):
    assert cli(*flow, "--output", tmp_path / "whole").status == 0
    assert cli(*flow, "--iterations", 3, "--output", tmp_path / "flipped").status == 0
    newest = tmp_path / "flipped/quickstart/checkpoints/0000003.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 4
    newest.write_bytes(data)
    (tmp_path / "flipped/quickstart/lora/quickstart.safetensors").unlink()
    done = cli(*flow, "--resume", "--output", tmp_path / "flipped")
    (line,) = [line for line in done.err if "damaged" in line]
    print(f"\n{line}")
    assert line == f"checkpoint {newest} is damaged (its content differs from its checksum); the one before is used"
    assert done.status == 0 and any("goes on after iteration 2" in line for line in done.err)
    assert equal(lora(tmp_path / "flipped"), lora(tmp_path / "whole")) and rows(tmp_path / "flipped") == rows(tmp_path / "whole")


def test_a_clock_that_jumps_changes_nothing(cli, flow, tmp_path, monkeypatch):
    assert cli(*flow, "--output", tmp_path / "whole").status == 0
    real, jumps = time.time, []

    def jumping():
        jumps.append(1)
        return real() + (-1) ** len(jumps) * 86400 * 400

    monkeypatch.setattr(time, "time", jumping)
    assert cli(*flow, "--output", tmp_path / "jumped").status == 0 and len(jumps) >= ITERATIONS
    monkeypatch.undo()
    assert equal(lora(tmp_path / "jumped"), lora(tmp_path / "whole")) and rows(tmp_path / "jumped") == rows(tmp_path / "whole")
    lines = (tmp_path / "jumped/quickstart/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(0 <= value < 600 for line in lines for value in json.loads(line)["seconds"].values())


# -- processes ---------------------------------------------------------------------------------------------------------------------
FAULT = """
import os, time
from pathlib import Path

import torch
from comfy_dancegrpo.policies.base import Policy

def told(fault):
    flag = Path({folder!r}) / (os.environ.get("RANK", "0") + "-" + fault)
    there = flag.exists()
    flag.unlink(missing_ok=True)
    return there

def load(source):
    predict = Policy.predict

    def scarce(self, *arguments):
        if told("memory"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, *arguments)

    def score(pictures, prompts):
        if told("hang"):
            time.sleep(600)
        return pictures.mean(dim=(1, 2, 3))

    Policy.predict = scarce
    return score
"""


@pytest.fixture
def together(loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    """`together(*words)` starts a run whose reward fails where a file in the folder `faults` says so: RANK-hang, RANK-memory."""
    folder, faults = tmp_path / "rewards", tmp_path / "faults"
    folder.mkdir(), faults.mkdir()
    (folder / "failing.py").write_text(FAULT.format(folder=str(faults)))
    (tmp_path / "settings.json").write_text(json.dumps({"reward_folders": [str(folder)]}))
    monkeypatch.setenv(settings.PATH, str(tmp_path / "settings.json"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    loop_only["3"]["inputs"]["reward"] = "failing"
    words = ["run", saved(loop_only), *tiny_loop, "--iterations", 3, "--set", "Loop Start.checkpoint_every=1", "--output", tmp_path / "output"]

    def run(*more):
        return subprocess.Popen([sys.executable, "-m", "comfy_dancegrpo.trainer", *map(str, [*words, *more])], cwd=tmp_path,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    return run


def ended(process):
    children = psutil.Process(process.pid).children()
    lines = process.communicate(timeout=200)[1].splitlines()
    assert not any(child.is_running() for child in children)
    return process.returncode, lines


def test_a_run_of_one_process_goes_on_in_two(together, tmp_path):
    def done(*more):
        status, lines = ended(together(*more))
        assert status == 0, lines
        return lines

    done("--output", tmp_path / "whole")
    done("--iterations", 2)
    (tmp_path / "output/quickstart/lora/quickstart.safetensors").unlink()
    lines = done("--resume", "--processes", 2)
    assert any("the number of processes changes from 1 to 2: from here on the run is not bit for bit" in line for line in lines)
    assert [row["iteration"] for row in rows(tmp_path / "output")] == [1, 2, 3]
    found, expected = (torch.cat([t.double().flatten() for _, t in sorted(lora(tmp_path / name).items())]) for name in ("output", "whole"))
    off = ((found - expected).norm() / expected.norm()).item()
    print(f"\nLoRA off by {off:.1e}")
    assert off < 1e-3


@linux
def test_a_process_that_hangs_is_named_and_the_run_goes_on_in_another_number_of_processes(together, tmp_path, cli):
    process = together("--processes", 2, "--hang-timeout", 30)
    for line in process.stderr:
        if line.startswith("1/3 "):
            (tmp_path / "faults" / "1-hang").touch()
            break
    start = time.monotonic()
    status, lines = ended(process)
    (line,) = [line for line in lines if "has moved" in line]
    print(f"\nhang, {time.monotonic() - start:.0f} s: {line}")
    assert status == 3 and line.startswith('dancegrpo: nothing has moved for 30 s (--hang-timeout): ended process 1 in "Score", for which process 0 waited')
    assert time.monotonic() - start < 90
    done = cli(*resume_words(line), "--processes", 1)
    assert done.status == 0, done.err
    assert any("the number of processes changes from 2 to 1" in said for said in done.err)
    assert [row["iteration"] for row in rows(tmp_path / "output")] == [1, 2, 3]


@linux
def test_one_of_two_that_runs_out_of_memory(together, tmp_path):
    process = together("--processes", 2, "--set", "Loop Start.on_out_of_memory=halve")
    for line in process.stderr:
        if line.startswith("1/3 "):
            (tmp_path / "faults" / "1-memory").touch()
            break
    status, lines = ended(process)
    assert status == 0, "\n".join(lines)
    print(*[line for line in lines if line.startswith("dancegrpo: ")], sep="\n")
    assert "dancegrpo: the processes are started again, with half the micro-batch" in lines
    newest = checkpoints.newest(tmp_path / "output/quickstart/checkpoints")
    assert (newest.iterations, newest.micro_batch, newest.processes) == (3, 2, 2)
    assert [row["iteration"] for row in rows(tmp_path / "output")] == [1, 2, 3]


@linux
def test_a_second_run_in_the_folder_is_refused(together, tmp_path):
    (tmp_path / "faults" / "0-hang").touch()
    first = together("--processes", 2)
    try:
        for line in first.stderr:
            if line == "Score\n":
                break
        status, lines = ended(together("--processes", 2, "--resume"))
        (said,) = [line for line in lines if line.startswith("dancegrpo: ")]
        print(f"\n{said}")
        assert status == 3 and "run 'quickstart'" in said and "is in use: process " in said
    finally:
        children = psutil.Process(first.pid).children()
        first.kill()
        assert not psutil.wait_procs(children, timeout=30)[1]  # none outlives its launcher
        first.communicate()


# -- killed and resumed -------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_runs_killed_at_random_are_the_run_left_alone(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks/kill_and_resume.py", "--runs", "3", "--iterations", "4", "--folder", tmp_path],
                          capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(done.stdout)
    assert done.returncode == 0 and "3 of 3 equal to the run left alone" in done.stdout, done.stdout + done.stderr


def test_weights_that_differ_between_processes_are_named_at_each_checkpoint(cli, flow, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "strayed", lambda self: [1, 3])
    done = cli(*flow, "--set", "Loop Start.checkpoint_every=3", "--output", tmp_path)
    said = [line for line in done.err if "not the same in all processes" in line]
    assert [line.partition(":")[2].partition(":")[0] for line in said] == [" iteration 3", " iteration 4"]
    assert all("those of 1, 3 differ from those of 0" in line for line in said)


def test_the_launcher_is_told_while_a_broken_off_run_keeps_what_it_has(cli, flow, tmp_path, monkeypatch):
    told, zero_grad, save = [], Learner.zero_grad, checkpoints.save

    def fails(self):
        if self.version[1] == 1:
            raise RuntimeError("planted")
        zero_grad(self)

    monkeypatch.setattr(Learner, "zero_grad", fails)
    monkeypatch.setattr(pulse, "tell", lambda **changes: told.append(changes.get("keeps")))
    monkeypatch.setattr(checkpoints, "save", lambda *given: told.append("written") or save(*given))
    assert cli(*flow, "--set", "Loop Start.checkpoint_every=0", "--output", tmp_path).status == 3
    assert [what for what in told if what is not None] == [True, "written", False]
