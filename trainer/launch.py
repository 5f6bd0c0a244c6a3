"""Starts the processes of one run on this machine, watches them, and passes signals on. Many machines: torchrun, accelerate launch.

Each process gets what torchrun would give it. None outlives this one: each holds the end of a pipe that closes with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.processes import SIZES

HELD = "DANCEGRPO_LAUNCHED"  # set in a process that was started here
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has the latter alone
GRACE = 8.0  # seconds that the others get to end by themselves when one has failed, and again after they were told to


def started(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes a launcher says that it started, this one among them; None where none says anything."""
    return next((int(environment[name]) for name in SIZES if environment.get(name, "").isdigit()), None)


def wanted(processes: int | None) -> int:
    """How many processes to start here: 1 means that this one trains. Raises `WorkflowError` where a launcher started another number."""
    there = started()
    if there is not None:
        if processes is not None and processes != there:
            raise WorkflowError(f"--processes: found {processes}, and the launcher started {there}; accepted: the same number, or none said")
        return 1
    visible = _accelerators()
    if processes is not None and visible and processes > visible:
        raise WorkflowError(f"--processes: found {processes}, accepted: up to {visible}, the GPUs that are visible")
    return processes or max(1, visible)


def _accelerators() -> int:
    import torch

    if hasattr(torch, "accelerator") and torch.accelerator.is_available():
        return torch.accelerator.device_count()
    return torch.cuda.device_count()


def launch(count: int, words: Sequence[str]) -> int:
    """Runs `dancegrpo` with these words in `count` processes; returns the exit status of the first that failed, or 0.

    When one fails the others are ended. SIGINT and SIGTERM go to every process once each time they come.
    """
    held, holding = os.pipe()
    os.set_inheritable(held, True)
    port, words = _free_port(), [sys.executable, "-m", "comfy_dancegrpo.trainer", *words]
    children = [subprocess.Popen(words, env=_environment(count, rank, port, held), close_fds=False, start_new_session=True) for rank in range(count)]
    os.close(held)
    try:
        return _followed(children)
    finally:
        os.close(holding)


def follow(words: Sequence[str]) -> int:
    """Runs another launcher's command, and passes signals on to it; returns its exit status."""
    return _followed([subprocess.Popen(words, start_new_session=True)])


def _followed(children: list[subprocess.Popen]) -> int:
    told: list[int] = []
    previous = {s: signal.signal(s, lambda signum, frame: told.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _watch(children, told)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        _end(children, _KILL)


def _watch(children: list[subprocess.Popen], told: list[int]) -> int:
    failed, since = 0, 0.0
    while any(child.poll() is None for child in children):
        while told:
            _end(children, told.pop(0))
        ended = next((child.returncode for child in children if child.returncode), 0)
        if ended and not failed:
            failed, since = ended, time.monotonic()
        if failed and time.monotonic() > since + GRACE:
            _end(children, signal.SIGTERM if time.monotonic() < since + 2 * GRACE else _KILL)
            time.sleep(GRACE / 8)
        time.sleep(0.05)
    failed = failed or next((child.returncode for child in children if child.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _end(children: list[subprocess.Popen], signum: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signum)


def _environment(count: int, rank: int, port: int, held: int) -> dict[str, str]:
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return {**os.environ, **threads, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), HELD: str(held)}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def end_with_the_launcher() -> None:
    """In a process that was started here: ends it, at once, when the one that started it is gone."""
    held = os.environ.pop(HELD, "")
    if not held.isdigit():
        return

    def wait() -> None:
        try:
            os.read(int(held), 1)  # nothing is ever written: it returns when the other end closes
        except OSError:
            return
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def accelerate_words(config: Path, words: Sequence[str]) -> list[str]:
    """The command by which accelerate starts what its configuration file says. Raises `WorkflowError` for a file that is not there."""
    if not config.is_file():
        raise WorkflowError(f"--config: found {config}, which is not there; accepted: a file that `accelerate config` wrote")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "comfy_dancegrpo.trainer", *words]


def configured(config: Path) -> int:
    """How many processes accelerate's configuration file asks for. Raises `WorkflowError` for a file that does not say it."""
    import yaml

    try:
        return int(yaml.safe_load(config.read_text(encoding="utf-8"))["num_processes"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise WorkflowError(f"--config: {config} does not say num_processes ({type(error).__name__}); accepted: a file that "
                            "`accelerate config` wrote") from None
