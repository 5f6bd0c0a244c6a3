"""Runs a function of a test in several processes, as the program's own launcher would start them."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SCRIPT = """
import importlib.util, pickle, sys
from pathlib import Path
file, name, arguments, out = sys.argv[1:]
sys.path.insert(0, str(Path(file).parent / "support"))
spec = importlib.util.spec_from_file_location("spmd_test", file)
module = importlib.util.module_from_spec(spec)
sys.modules["spmd_test"] = module
spec.loader.exec_module(module)
found = getattr(module, name)(*pickle.loads(bytes.fromhex(arguments)))
from comfy_dancegrpo import processes
Path(f"{out}-{processes.rank()}").write_bytes(pickle.dumps(found))
processes.end()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(count: int, rank: int, port: int) -> dict[str, str]:
    return {**os.environ, "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def in_processes(count: int, function: Callable, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, of a test's module, returns in each of `count` processes. With one, no group is made."""
    out, port = folder / f"spmd-{count}", free_port()
    words = [sys.executable, "-c", _SCRIPT, function.__code__.co_filename, function.__name__, pickle.dumps(arguments).hex(), str(out)]
    started = [subprocess.Popen(words, env=environment(count, rank, port), stderr=subprocess.PIPE, text=True) for rank in range(count)]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return [pickle.loads(Path(f"{out}-{rank}").read_bytes()) for rank in range(count)]


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Of all their numbers, relative to those of `b`."""
    assert a.keys() == b.keys()
    squares = [((a[name].double() - b[name].double()).square().sum(), b[name].double().square().sum()) for name in b]
    off, size = map(sum, zip(*squares))
    return (off / size).sqrt().item()
