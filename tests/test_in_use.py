"""Several processes and one run's folder: one trains at a time, a killed one is known for what it is, and an empty run leaves nothing."""

import contextlib
import errno
import os
import signal
import subprocess
import sys

import filelock
import pytest

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.runs import live, lock
from comfy_dancegrpo.runs.folder import RunFolder, claim
from comfy_dancegrpo.workflow.host import Host, use

# a process that claims a run, says what it got, and holds it until its stdin ends
HOLDER = """
import sys
from comfy_dancegrpo.runs.folder import claim
from comfy_dancegrpo.workflow.host import Host, use
with use(Host(output=sys.argv[1])):
    folder, action, held = claim("run", "same", 5, 4, sys.argv[2])
    if len(sys.argv) < 4:
        folder.create("same", 4) if action == "start" else folder.write_running()
    print(folder.name, action, flush=True)
    sys.stdin.read()
"""

# a process that takes a run's folder and discards it, again and again, and says how often; whoever holds it is alone
TAKE_AND_DISCARD = """
import sys, time
from pathlib import Path
from comfy_dancegrpo.runs import lock
from comfy_dancegrpo.runs.folder import RunFolder
folder, alone, held_it, until = RunFolder(Path(sys.argv[1])), Path(sys.argv[1] + ".held"), 0, time.monotonic() + 3
while time.monotonic() < until:
    held = lock.take(folder.path)
    if held is None:
        continue
    alone.touch(exist_ok=False)
    time.sleep(0.001)
    alone.unlink()
    held_it += 1
    folder.discard()
    held.release()
print(held_it)
"""


@pytest.fixture
def output(tmp_path):
    with use(Host(output=tmp_path)):
        yield tmp_path


@contextlib.contextmanager
def holder(output, on_existing="resume", *only_claims):
    """Another process that holds the run: what it said, and the process."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(output), on_existing, *only_claims], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split(), process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("on_existing", ["resume", "restart"])
def test_a_second_process_is_refused_in_one_line_and_changes_nothing(output, on_existing):
    with holder(output) as (said, process):
        assert said == ["run", "start"] and live.read(output / "run")["state"] == "running"
        before = (output / "run" / "run.json").read_bytes()
        with pytest.raises(RunError) as error:
            claim("run", "same", 5, 4, on_existing)
        line = str(error.value)
        print(f"\n{line}")
        record = RunFolder(output / "run").record["process"]
        assert line == (f"run 'run' in {output / 'run'} is in use: process {process.pid} on {record['host']} trains it since {record['since']}; "
                        'accepted: to wait until it has ended, or another "run_name"')
        assert (output / "run" / "run.json").read_bytes() == before


def test_new_takes_the_next_name_beside_a_process_that_trains_or_has_just_begun(output):
    for only_claims in ((), ("1",)):
        with holder(output, "new", *only_claims) as (said, _):
            assert said == ["run", "start"] if not only_claims else said[1] == "start"
            folder, action, held = claim("run", "same", 5, 4, "new")
            assert action == "start" and folder.name not in (said[0], "run")
            held.release()


def test_two_that_start_one_run_at_once(output):
    with holder(output, "new") as (one, _), holder(output, "new") as (other, _):
        assert {one[0], other[0]} == {"run", "run-2"} and one[1] == other[1] == "start"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_process_leaves_its_run_interrupted_and_free(output):
    with holder(output) as (_, process):
        assert lock.held(output / "run")
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        # its number may be another's by now: here, one that lives
        RunFolder(output / "run").write_record(process={"pid": os.getpid(), "host": "here", "since": "now"})
        assert live.read(output / "run")["state"] == "interrupted" == live.list_runs(output)[0]["state"]
        assert live.read(output / "run")["kept"] == 0
    folder, action, held = claim("run", "same", 5, 4, "resume")
    assert action == "resume" and lock.held(output / "run")
    folder.write_running()
    assert live.read(output / "run")["state"] == "running"
    held.release()
    assert live.read(output / "run")["state"] == "interrupted"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_process_killed_before_it_wrote_anything_is_in_nobodys_way(output):
    with holder(output, "resume", "only claims") as (_, process):
        with pytest.raises(RunError, match="is in use: another process has opened it"):
            claim("run", "same", 5, 4, "resume")
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    folder, action, held = claim("run", "same", 5, 4, "resume")
    assert (folder.name, action) == ("run", "start")
    held.release()


def test_looking_never_keeps_a_run_from_starting(output):
    (output / "run" / "live").mkdir(parents=True)
    lock.path_of(output / "run").touch()
    looking = subprocess.Popen([sys.executable, "-c", "import sys; from pathlib import Path; from comfy_dancegrpo.runs import lock\n"
                                "while True: lock.held(Path(sys.argv[1]))", str(output / "run")])
    try:
        for _ in range(20):
            held = lock.take(output / "run")
            assert held is not None
            held.release()
    finally:
        looking.kill()
        looking.wait()


def test_who_waits_while_the_holder_discards_the_folder_gets_it(output, monkeypatch):
    """The folder goes at the worst moment: after the waiting process has seen to it that it is there."""
    folder, acquire, gone = RunFolder(output / "run"), filelock.FileLock.acquire, []
    held = lock.take(folder.path)
    folder.create("print", 4)

    def discard_first(self, *arguments, **options):
        if not gone:
            gone.append(folder.path)
            with monkeypatch.context() as around:
                around.setattr(filelock.FileLock, "acquire", acquire)
                folder.discard()
                held.release()
            assert not folder.path.exists()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(lock.path_of(folder.path)))  # what opening its lock gives then
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", discard_first)
    taken = lock.take(folder.path)
    assert gone and taken is not None and lock.held(folder.path)
    taken.release()


def test_a_folder_that_cannot_be_made_is_an_error_and_not_waited_for_forever(output):
    (output / "run").mkdir()
    (output / "run" / "live").touch()  # where the lock's folder would be
    with pytest.raises(FileExistsError):
        lock.take(output / "run")


def test_processes_that_take_and_discard_one_folder_never_fail_nor_hold_it_together(output):
    words = [sys.executable, "-c", TAKE_AND_DISCARD, str(output / "run")]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) > 0  # how often it held the folder


def test_discarding_spares_what_no_run_writes(output):
    for name in ("run", "kept"):
        folder = RunFolder(output / name)
        held = lock.take(folder.path)
        folder.create("print", 4)
        folder.images.mkdir()
        if name == "kept":
            (folder.path / "notes.txt").write_text("mine")
        folder.discard()
        held.release()
    assert [p.name for p in output.iterdir()] == ["kept"] and RunFolder(output / "kept").record


def test_a_fault_in_the_first_iteration_leaves_no_folder(cli, loop_only, saved, tiny_loop, tmp_path):
    words = ["run", saved(loop_only), "--output", tmp_path / "out", *tiny_loop]
    done = cli(*words, "--set", "Group Sample.group_size=1")
    (line,) = done.verdict
    assert done.status == 3 and 'input "group_size"' in line and "resume" not in line and list((tmp_path / "out").iterdir()) == []


def test_a_fault_in_the_first_iteration_spares_a_run_that_was_there(cli, loop_only, saved, tiny_loop, tmp_path):
    """One that was killed before its first checkpoint."""
    folder = RunFolder(tmp_path / "out" / "quickstart")
    with use(Host(output=tmp_path / "out")):
        folder.create("print", 4)
    for on_existing in ("restart", "resume"):
        done = cli("run", saved(loop_only), "--output", tmp_path / "out", *tiny_loop, "--set", "Group Sample.group_size=1",
                   "--set", f"Loop Start.on_existing={on_existing}")
        assert done.status == 3 and 'input "group_size"' in done.verdict[0] and "; resume with: " in done.verdict[0]
        assert folder.record["state"] == "stopped" and "process" not in folder.record
