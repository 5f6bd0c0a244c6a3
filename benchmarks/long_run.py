"""What grows with the number of iterations: memory, seconds of an iteration, and each part of a run's folder, over a long run of the embedded policy.

    python benchmarks/long_run.py --iterations 1000

A run of the quickstart up to its saved LoRA, in tiny settings, as a program of its own that is looked at from outside; a row for each mark. Nothing but
metrics.jsonl should grow: checkpoints and pictures are the last few and milestones. Needs psutil (accelerate brings it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the iterations, where it is looked at
SETTINGS = {"Loop Start.prompts_per_iteration": 2, "Loop Start.micro_batch": 4, "Loop Start.checkpoint_every": 10, "Group Sample.group_size": 2,
            "Group Sample.steps": 3, "Update.optimizer_steps": 2}
PARTS = ("metrics.jsonl", "checkpoints", "pictures", "live")


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """(files, bytes) of each part of a run's folder that is written again and again; a file that goes away meanwhile is left out."""
    found = {}
    for entry in (folder / name for name in PARTS):
        files = [entry, *entry.rglob("*")]
        there = [path.stat().st_size for path in files if path.is_file()]
        found[entry.name] = (len(there), sum(there))
    return found


def told(files: int, size: int) -> str:
    return f"{files} files, {-(-size // 1024)} KiB"


def watch(child: subprocess.Popen, folder: Path, marks: list[int]) -> list[dict[str, Any]]:
    """A row for each mark, once that many iterations are in metrics.jsonl: memory [MiB] of the program, and `sizes`."""
    rows, program, log = [], psutil.Process(child.pid), folder / "metrics.jsonl"
    while marks and child.poll() is None:
        done = log.read_bytes().count(b"\n") if log.exists() else 0
        if done >= marks[0]:
            try:
                rows.append({"iteration": marks.pop(0), "memory": program.memory_info().rss / 2**20, "sizes": sizes(folder)})
            except psutil.Error:  # it has just ended
                break
        time.sleep(0.02)
    return rows


def table(rows: list[dict[str, Any]], seconds: list[float]) -> list[str]:
    """Memory, the median seconds of the iterations since the row before, and the folder's parts: files, KiB."""
    text, before = [f"{'iteration':>9}{'MiB':>8}{'s/iteration':>13}" + "".join(f"{name:>22}" for name in PARTS)], 0
    for row in rows:
        of_part = "".join(f"{told(*row['sizes'][name]):>22}" for name in PARTS)
        text.append(f"{row['iteration']:>9}{row['memory']:>8.0f}{median(seconds[before:row['iteration']]):>13.4f}{of_part}")
        before = row["iteration"]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=1000)
    options = parser.parse_args()
    from benchmarks.kill_and_resume import graph  # it loads torch

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "flow.json").write_text(json.dumps(graph()), encoding="utf-8")
        words = ["run", str(Path(place) / "flow.json"), "--output", place, "--run", "long", "--iterations", str(options.iterations)]
        for name, value in SETTINGS.items():
            words += ["--set", f"{name}={value}"]
        folder = Path(place) / "long"
        with (Path(place) / "log").open("wb") as log:
            child = subprocess.Popen([sys.executable, "-m", "comfy_dancegrpo.trainer", *words], stdout=log, stderr=log)
            rows = watch(child, folder, sorted({max(1, round(share * options.iterations) - 1) for share in SHARES}))
        if child.wait():
            raise SystemExit((Path(place) / "log").read_text(encoding="utf-8", errors="replace")[-2000:])
        seconds = [json.loads(line)["seconds"]["total"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        print("\n".join(table(rows, seconds)))
        print("at the end: " + ", ".join(f"{name} {told(*size)}" for name, size in sizes(folder).items()))


if __name__ == "__main__":
    main()
