"""How the launcher ends what is left when a process has failed: small programs stand in for those that train."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comfy_dancegrpo import processes, pulse
from comfy_dancegrpo.trainer import launch
from comfy_dancegrpo.trainer.session import Options, how_to_resume
from comfy_dancegrpo.workflow.host import Host

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that a test could send")

FAILS = "import sys; sys.exit(3)"
KEEPS = """
import signal, sys, time
from comfy_dancegrpo import pulse
told = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda signum, frame: told.append(signum))
with pulse.keeping():
    print("keeps", flush=True)
    time.sleep(float(sys.argv[1]))
print("told", len(told), flush=True)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, lambda signum, frame: print("told", flush=True))
print("ready", flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """`watched(program, ...)`: what the second process, which runs this program, said and how it ended, after the first has failed; and how long that took."""
    monkeypatch.setattr(launch, "GRACE", 1.0)

    def watch(program, *words, keeping=60.0):
        monkeypatch.setattr(launch, "KEEPING", keeping)
        (tmp_path / "pulses").mkdir()
        environment = {**os.environ, pulse.FOLDER: str(tmp_path / "pulses"), "RANK": "1"}
        other = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], env=environment, stdout=subprocess.PIPE, text=True)
        said = [other.stdout.readline()]
        failing = subprocess.Popen([sys.executable, "-c", FAILS])
        start = time.monotonic()
        try:
            status = launch._watch([failing, other], [], launch.Pulses(tmp_path / "pulses", 600, str))
        finally:
            other.kill()
        return [line.strip() for line in (*said, *other.stdout)], other.wait(), status, time.monotonic() - start

    return watch


def test_one_that_writes_what_the_run_leaves_is_let_be(watched):
    assert watched(KEEPS, 6)[:3] == (["keeps", "told 0"], 0, 3)


def test_not_for_ever(watched):
    said, ended, status, seconds = watched(KEEPS, 600, keeping=3.0)
    assert (said, ended, status) == (["keeps"], -signal.SIGKILL, 3) and 3 < seconds < 30


def test_one_that_does_not_end_is_told_twice_and_killed(watched):
    said, ended, status, seconds = watched(DEAF)
    assert (said, ended, status) == (["ready", "told", "told"], -signal.SIGKILL, 3) and 3 <= seconds < 15


def test_within_thirty_seconds():
    assert 3 * launch.GRACE < 30 < launch.KEEPING


CHILD = """
import sys, time
from pathlib import Path
from comfy_dancegrpo.trainer import launch
launch._LOOK = 0.1
launch.end_with_the_launcher(lambda: sys.argv[2] == "stopping")
Path(sys.argv[1] + ".begun").touch()
time.sleep(3)
Path(sys.argv[1]).touch()
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"


@pytest.mark.parametrize("state", ["stopping", "training"])
def test_a_launcher_that_is_gone(tmp_path, state):
    """accelerate launch leaves on Ctrl-C, which its one process has got too, and is saving by."""
    done = tmp_path / state
    words = [sys.executable, "-c", PARENT, CHILD, str(done), state]
    parent = subprocess.Popen(words, env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"})
    wait_until(Path(f"{done}.begun").exists)
    parent.kill()
    parent.wait()
    if state == "stopping":
        return wait_until(done.exists)
    time.sleep(5)
    assert not done.exists()


def wait_until(true, seconds=60):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("world, local, sharded, given, line", [
    (None, None, False, Options(), "; resume with: dancegrpo run flow.json --output output --run a"),
    ("2", "2", False, Options(), "; resume with: dancegrpo run flow.json --output output --run a --processes 2"),
    ("4", "2", False, Options(), "; resume by the same launcher with: -m comfy_dancegrpo.trainer run flow.json --output output --run a"),
    ("2", "2", True, Options(), "; resume by the same launcher with: -m comfy_dancegrpo.trainer run flow.json --output output --run a"),
    ("2", "2", True, Options(config=Path("two.yaml")), "; resume with: dancegrpo run flow.json --output output --run a --config two.yaml"),
    (None, None, False, Options(processes=2, hang_timeout=60.0), "; resume with: dancegrpo run flow.json --output output --run a --processes 2 --hang-timeout 60.0"),
])
def test_the_line_about_resuming_starts_as_many(monkeypatch, world, local, sharded, given, line):
    for name, value in (("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", local)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "sharded", lambda: sharded)
    host = Host()
    host.run_folder = Path("output/a")
    assert how_to_resume(host, Path("flow.json"), given) == line


def test_the_launchers_own_processes_are_told_of_as_they_were_started(monkeypatch, tmp_path):
    """It is said how many by the options alone: without them as many as there are GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv(pulse.FOLDER, str(tmp_path))
    host = Host()
    host.run_folder = Path("output/a")
    assert how_to_resume(host, Path("flow.json"), Options()) == "; resume with: dancegrpo run flow.json --output output --run a"
