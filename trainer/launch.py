"""Starts the processes of one run on this machine, watches them, and passes signals on. Many machines: torchrun, accelerate launch.

Each process gets what torchrun would give it. None outlives the launcher that started it, whichever that is.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from comfy_dancegrpo import pulse
from comfy_dancegrpo.errors import DanceGRPOError, Interrupted, RunError, WorkflowError
from comfy_dancegrpo.processes import AGAIN, LAUNCHER, started

_OTHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # by which torchrun and accelerate launch are known
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has the latter alone
_STOPPED = (Interrupted.exit_status, 128 + signal.SIGTERM)
GRACE = 9.0  # seconds that the others get to end by themselves when one has failed, again after they were told to, and after they were told to at once
KEEPING = 600.0  # seconds that one gets beyond that which writes what is to be left of the run
_LOOK = 0.5  # seconds between two looks whether the launcher is there


def asked(processes: int | None, config: Path | None) -> int | None:
    """How many processes the command line asks for, None where it leaves that open. Raises `WorkflowError` where two say different numbers."""
    if config is None:
        return processes
    number = configured(config)
    if processes not in (None, number):
        raise WorkflowError(f"--processes: found {processes}, and {config} says num_processes {number}; accepted: one of the two, or the same number")
    return number


def check_started(number: int | None, what: str = "--processes") -> None:
    """Raises `WorkflowError` where a launcher started another number of processes than is asked for; to be called before they meet."""
    there = started()
    if there is not None and number not in (None, there):
        raise WorkflowError(f"{what}: found {number}, and the launcher started {there}; accepted: the same number, or none said")
    if there == 1 and number is None and "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:  # which it sets for several
        raise WorkflowError("accelerate launch was asked for several processes and started this one alone, as it does on CPUs; accepted: torchrun, "
                            "or --processes 1 to train in one")


def wanted(number: int | None, what: str = "--processes") -> int:
    """How many processes to start here: 1 means that this one trains, as it does under another launcher. Raises `WorkflowError` for too many."""
    if started() is not None:
        return 1
    visible = _accelerators() if number != 1 else 1
    if number is not None and visible and number > visible:
        raise WorkflowError(f"{what}: found {number}, accepted: up to {visible}, the GPUs that are visible")
    return number or max(1, visible)


def _accelerators() -> int:
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t"):
        return 0
    if hasattr(torch, "accelerator"):
        return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return torch.cuda.device_count()


def launch(count: int, words: Sequence[str], hang_timeout: float, resume: Callable[[str], str]) -> int:
    """Runs `dancegrpo` with these words in `count` processes; returns the exit status of the first that failed, or 0.

    When one fails the others are ended, and where none has moved for `hang_timeout` seconds all are; `resume(run's folder)` ends the line about it.
    Where one ran out of memory and the run is to go on with half the micro-batch, all are started again. SIGINT and SIGTERM go to every process each
    time they come, and the third time all are killed.
    """
    told: list[int] = []
    previous = {s: signal.signal(s, lambda signum, frame: told.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            with tempfile.TemporaryDirectory(prefix="dancegrpo-") as folder:
                status = _run(count, words, Pulses(Path(folder), hang_timeout, resume), told)
                run = pulse.read(Path(folder)).get(0, {}).get("run", "")
            if status != AGAIN or told or not run:
                return status
            print("dancegrpo: the processes are started again, with half the micro-batch", file=sys.stderr, flush=True)
            words = [*words, "--run", Path(run).name, "--resume"]
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _run(count: int, words: Sequence[str], pulses: Pulses, told: list[int]) -> int:
    port, words = _free_port(), [sys.executable, "-m", "comfy_dancegrpo.trainer", *words]
    children: list[subprocess.Popen] = []
    try:
        for rank in range(count):
            environment = {**_environment(count, rank, port), pulse.FOLDER: str(pulses.folder)}
            children.append(subprocess.Popen(words, env=environment, start_new_session=True))
        return _watch(children, told, pulses)
    finally:
        _end(children, _KILL)


class Pulses:
    """What the processes tell of themselves, and how long it has been the same."""

    def __init__(self, folder: Path, hang_timeout: float, resume: Callable[[str], str]):
        self.folder, self.hung = folder, set()
        self._timeout, self._resume, self._last, self._since, self._looked = hang_timeout, resume, {}, time.monotonic(), 0.0

    def find_hung(self, children: list[subprocess.Popen]) -> list[subprocess.Popen]:
        """Those to be ended because nothing has moved for too long, which is told, once: those that compute, or where all wait, all."""
        now = time.monotonic()
        if self.hung or now < self._looked + _LOOK:
            return []
        self._looked, found = now, pulse.read(self.folder)
        if found != self._last:
            self._last, self._since = found, now
        if now < self._since + self._timeout:
            return []
        waiting = [rank for rank in range(len(children)) if found.get(rank, {}).get("waits")]
        self.hung = set(range(len(children))) - set(waiting) or set(waiting)
        names = ", ".join(f"process {rank}" + (f' in "{node}"' if (node := found.get(rank, {}).get("node")) else "") for rank in sorted(self.hung))
        others = f", for which {_listed(waiting)} waited" if set(waiting) - self.hung else ", each waiting for the others" if waiting else ""
        run = found.get(0, {}).get("run", "")
        print(f"dancegrpo: nothing has moved for {self._timeout:g} s (--hang-timeout): ended {names}{others}{self._resume(run)}", file=sys.stderr, flush=True)
        return [children[rank] for rank in self.hung]

    def keeping(self) -> list[int]:
        """Those that write, or wrote when they ended, what is to be left of the run."""
        return [rank for rank, told in pulse.read(self.folder).items() if told.get("keeps")]


def _listed(ranks: list[int]) -> str:
    return ("process " if len(ranks) == 1 else "processes ") + ", ".join(map(str, ranks))


def _watch(children: list[subprocess.Popen], told: list[int], pulses: Pulses) -> int:
    failed, since, deadline, urged, handled = None, 0.0, 0.0, 0, 0
    while None in [child.poll() for child in children]:  # all are asked: what `any` leaves out would not be known to have failed
        for signum in told[handled:]:
            handled += 1
            _end(children, signum if handled < 3 else _KILL)
        if failed is None:
            _end(pulses.find_hung(children), _KILL)
            if (failed := _first_failed(children, told, pulses.hung)) is not None:
                since = time.monotonic()
                deadline = since + GRACE
        if failed is not None and time.monotonic() > deadline:
            keeping = time.monotonic() < since + KEEPING and any(children[rank].poll() is None for rank in pulses.keeping())
            if not keeping:
                _end(children, signal.SIGTERM if urged < 2 else _KILL)
                urged += 1
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)
    failed = failed or _first_failed(children, told, pulses.hung)
    if any(child.returncode == AGAIN for child in children):
        return AGAIN
    if failed is None:  # those that were told to stop are no failures
        return 128 + told[0] if any(child.returncode for child in children) else 0
    return failed.returncode if failed.returncode > 0 else DanceGRPOError.exit_status


def _first_failed(children: list[subprocess.Popen], told: list[int], hung: Container[int]) -> subprocess.Popen | None:
    """One that has ended with an error, not because it was told to; one that could not say so itself is told of."""
    for rank, child in enumerate(children):
        if child.returncode and not (told and (child.returncode in _STOPPED or child.returncode < 0)):
            if child.returncode < 0 and rank not in hung:
                print(f"dancegrpo: process {rank} was killed by {signal.Signals(-child.returncode).name}", file=sys.stderr, flush=True)
            return child
    return None


def _end(children: list[subprocess.Popen], signum: int) -> None:
    for child in children:
        if child.poll() is None and (os.name != "nt" or signum != signal.SIGINT):  # there Ctrl-C has reached all that share the console
            child.send_signal(signum)


def _environment(count: int, rank: int, port: int) -> dict[str, str]:
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return {**os.environ, **threads, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LAUNCHER: str(os.getpid())}


def _free_port() -> int:
    """Below those that systems give to whoever asks for any: it is bound only seconds later, once the first process has come so far."""
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise RunError("no port of 100 from 20000 to 32767 is free for the processes to meet at")


def end_with_the_launcher(stopping: Callable[[], bool]) -> None:
    """In a process that a launcher started: ends it when that one is gone, killed and so unable to end it.

    Where it is `stopping` by itself it may do so: Ctrl-C reaches accelerate launch too, which does not wait for the one process that it started.
    """
    launcher = os.environ.pop(LAUNCHER, "")
    if not launcher.isdigit():
        if not any(name in os.environ for name in _OTHERS):
            return
        launcher = str(os.getppid())

    def watch() -> None:
        while not _gone(int(launcher)):
            time.sleep(_LOOK)
        until = time.monotonic() + KEEPING
        while stopping() and time.monotonic() < until:
            time.sleep(_LOOK)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _gone(parent: int) -> bool:
    if os.name != "nt":
        return os.getppid() != parent
    import psutil  # there a process keeps the number of a parent that is gone; accelerate brings it

    return not psutil.pid_exists(parent)


def accelerate(config: Path, words: Sequence[str]) -> int:
    """Runs `dancegrpo` with these words as accelerate's configuration file says, and returns the exit status.

    Where the system can, this process becomes accelerate's launcher, and nothing comes back.
    """
    words = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config), "-m", "comfy_dancegrpo.trainer",
             *words]
    if os.name == "nt":
        return subprocess.run(words).returncode
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, words)


def configured(config: Path) -> int:
    """How many processes accelerate's configuration file asks for. Raises `WorkflowError` for a file that does not say it, or says what it would not do."""
    import yaml

    if not config.is_file():
        raise WorkflowError(f"--config: found {config}, which is not there; accepted: a file that `accelerate config` wrote")
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        number = int(settings["num_processes"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise WorkflowError(f"--config: {config} does not say num_processes ({type(error).__name__}); accepted: a file that "
                            "`accelerate config` wrote") from None
    if settings.get("use_cpu") and number > 1 and not settings.get("mpirun_config"):
        raise WorkflowError(f"--config: {config} asks for {number} processes on CPUs (use_cpu), of which accelerate would start one; accepted: --processes {number}")
    return number
