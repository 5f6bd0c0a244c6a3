"""Who trains in a run's folder: a lock that the system holds for a process, and lets go of however the process ends.

The file `live/lock` says nothing by being there; only whether it is locked counts. So a killed process leaves nothing behind, and its
number may be given to another.

filelock 3.29.5 is the first that takes no lock on a file that was deleted meanwhile and, on Unix, deletes none on release, which may be another's.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

_WAIT = 2.0  # seconds: whoever looks holds the lock for an instant
_looking = threading.Lock()  # two who look at once would see each other


def path_of(folder: Path) -> Path:
    return folder / "live" / "lock"


def take(folder: Path) -> BaseFileLock | None:
    """The lock of a run's folder, which is made where it is not there, until `release()`; None where another has it."""
    from filelock import FileLock, Timeout

    until = time.monotonic() + _WAIT
    while True:
        try:
            path_of(folder).parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path_of(folder), thread_local=False)
            lock.acquire(timeout=_WAIT, poll_interval=0.02)
            return lock
        except Timeout:
            return None
        except (FileNotFoundError, FileExistsError):  # who held it discards the folder just now: between two looks it is there, and gone
            if time.monotonic() > until:
                raise
        time.sleep(0.02)


def held(folder: Path) -> bool:
    """Whether any process, this one too, trains in a folder now."""
    from filelock import FileLock, Timeout

    if not path_of(folder).is_file():
        return False
    lock = FileLock(path_of(folder), thread_local=False)
    with _looking:
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # a file that this user may not open tells nothing: what run.json says is believed
            return True
        lock.release()
    return False
